"""Train once, choose the average afterwards: a small language model, recorded in one run of about two minutes.

The model reads the sources of Python's own standard library, character by character, at a constant learning rate. The
run keeps means of blocks of steps in files. Afterwards averages with different half-lives are made from these files,
the best one by the loss on validation text is saved, and it is compared with the average that it stands for.

    python examples/choose_later.py
    python examples/choose_later.py --steps 1000 --seed 1 --output elsewhere
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from textwrap import dedent
from warnings import catch_warnings, simplefilter

import later
import torch
from characters import text
from characters.model import CONTEXT, Network, loss, measured
from later import KEPT, RAW, SYNTHESISED
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import polyak
from polyak.engine.bank import Bank
from polyak.errors import ConfigError, PolyakError, PolyakWarning
from polyak.posthoc import Recorder, Sweep, sweep

BATCH, LEARNING_RATE, WARMUP = 16, 3e-3, 100
PARTS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)  # half-lives that are tried, of the run
SNAPSHOTS = 150
DEFAULT = "EMA, decay 0.999 (a default)"


def train(parts: dict[str, text.Text], args: Namespace, console: Console) -> tuple[Network, Bank]:
    """Train once, with block means recorded; return the model and averages that were kept beside it."""
    torch.manual_seed(args.seed)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    blocks = polyak.average(model, "block_mean", length=args.every)
    # Nobody has to keep these: they are here to see afterwards whether what is synthesised is right.
    kept = polyak.bank(model, {**later.grid(args.steps, PARTS), DEFAULT: {"name": "ema", "decay": 0.999}})
    with Recorder(blocks, args.output / "snapshots", every=args.every):
        silent = not console.is_terminal
        for _ in track(range(args.steps), "training", console=console, transient=True, disable=silent):
            loss(model, parts["training"].random_windows(BATCH, CONTEXT)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            blocks.update()
            kept.update()
    return model, kept


def report(console: Console, found: Sweep, model: Network, kept: Bank, parts: dict[str, text.Text], count: int) -> None:
    """Print what was tried, and the best average beside the one that was really kept."""
    made = found.synthesis

    def loss_on(part: str, state: later.State) -> float:
        return measured(loaded(state), parts[part], count)

    weights = {
        RAW: model.state_dict(),
        DEFAULT: kept[DEFAULT].averaged_state_dict(),
        SYNTHESISED: made.state_dict,
        KEPT: kept[found.best.label].averaged_state_dict(),
    }
    losses = {f"{part} loss": lambda state, part=part: loss_on(part, state) for part in ("validation", "test")}
    console.print("What could have been chosen, by the validation loss:\n")
    print(found.table())
    console.print(f"\nThe best, {found.best.label}, beside what was there without it:\n")
    console.print(later.comparison(weights, model, losses))
    console.print(
        f"\nThe synthesised profile is {made.profile_error:.1%} off the wanted one; the coefficients of the snapshots "
        f"have Σ|x| = {made.amplification:.2f}."
    )


def draw(found: Sweep, raw: float, path: Path) -> None:
    """Draw the sweep."""
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    ax = figure.add_subplot()
    later.draw(found, raw, ax, title="One training run, and the averages that could have been chosen after it")
    ax.set_ylabel("validation loss (nats per character)")
    ax.grid(alpha=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def loaded(state: later.State) -> Network:
    """Return a network with these weights."""
    model = Network()
    model.load_state_dict(state)
    return model.eval()


def arguments(argv: list[str] | None) -> Namespace:
    """Return what the user asks for."""
    parser = ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=3000, metavar="N", help="optimiser steps (default: 3000)")
    add("--seed", type=int, default=0, metavar="N", help="decides the first weights and the order (default: 0)")
    add("--every", type=int, metavar="N", help=f"steps in a snapshot (default: a {SNAPSHOTS}th of the run)")
    add("--windows", type=int, default=512, metavar="N", help="windows that losses are measured on (default: 512)")
    add("--output", type=Path, default=Path("choose_later"), metavar="DIR", help="where all goes (./choose_later)")
    args = parser.parse_args(argv)
    if args.every is None:
        args.every = max(1, args.steps // SNAPSHOTS)
    return args


def check(args: Namespace) -> None:
    """Look at the options before anything is done.

    Raises:
        ConfigError: One cannot be used.
    """
    for option, value, least in (("steps", args.steps, 20), ("every", args.every, 1), ("windows", args.windows, 1)):
        if value < least:
            raise ConfigError(f"--{option} {value}: expected {least} or more")
    if args.every > args.steps:
        raise ConfigError(f"--every {args.every}: expected at most the {args.steps} steps of the run")
    if not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"--seed {args.seed}: expected a whole number from 0 to 2**63 - 1")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ConfigError(f"--output {args.output}: is there already; remove it, or name a folder that is new or empty")
    if not args.output.absolute().parent.is_dir():
        raise ConfigError(f"--output {args.output}: expected a folder in one that exists")


def main(argv: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    args = arguments(argv)
    torch.set_num_threads(1)  # the network is too small to be shared between cores
    try:
        check(args)
        parts = text.load()
        args.output.mkdir(exist_ok=True)
        run(args, parts)
    except (PolyakError, OSError) as error:
        print(f"choose_later.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: Namespace, parts: dict[str, text.Text]) -> None:
    """Train, choose and tell."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    lengths = [f"{len(parts[name].symbols):,} for {name}" for name in ("training", "validation", "test")]
    console.print(f"Text: sources of Python's own standard library; characters: {', '.join(lengths)}.")
    console.print(f"{args.steps} steps of {BATCH} × {CONTEXT} characters at a constant learning rate, recorded.")
    model, kept = train(parts, args, console)
    sizes = [path.stat().st_size for path in (args.output / "snapshots").iterdir()]
    console.print(
        f"Recorded: {len(sizes)} snapshots, each the mean of {args.every} steps; {sum(sizes) / 1e6:.0f} MB.\n"
    )
    best, picture = args.output / "best.safetensors", args.output / "sweep.png"
    with catch_warnings():
        simplefilter("ignore", PolyakWarning)  # the table and the picture tell which averages are poor
        found = sweep(
            args.output / "snapshots",
            lambda state: measured(loaded(state), parts["validation"], args.windows),
            later.grid(args.steps, PARTS),
            output=best,
        )
    report(console, found, model, kept, parts, args.windows)
    draw(found, measured(model, parts["validation"], args.windows), picture)
    print(f"\nPicture: {picture}\nThe best average: {best}; in the folder of this script it is loaded by\n")
    print(
        dedent(f"""\
        from characters.model import Network
        from safetensors.torch import load_file

        model = Network()
        model.load_state_dict(load_file({str(best.absolute())!r}))""")
    )


if __name__ == "__main__":
    sys.exit(main())
