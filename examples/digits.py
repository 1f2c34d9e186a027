"""What averaging buys on real data: every strategy, fed from the same training runs, in about a minute.

A small convolutional network learns scikit-learn's handwritten digits, with a constant and with a decaying learning
rate. All averages follow the same weights. The table says what each is worth on held-out digits, the picture how it
went and what each average is made of. At the end one more run is recorded, and the best average that could have been
chosen is made from the record.

    python examples/digits.py
    python examples/digits.py --strategy ema_v3 --set decay=0.99 --set use_warmup=false
    python examples/digits.py --config average.toml --seeds 3
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from demo.afterwards import Afterwards, afterwards
from demo.contenders import HALF_LIFE, Contender, every_strategy, from_files, named, parsed
from demo.report import overview, picture, table
from demo.training import SCHEDULES, Digits, Run, train
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polyak import ConfigError, PolyakError

NOTES = f"""\
mean ± standard deviation over seeds.
vs raw: the loss against that of the raw weights (seeds in which it is lower).
ms per update: processor time, and as a part of that of a training step, which
is short here; larger batches and networks make longer ones.
Where the demo chose a decay, its half-life is about {HALF_LIFE:.0%} of the run.
EMAs of one decay differ only in how they begin."""


def arguments(argv: list[str] | None) -> Namespace:
    """Return what the user asks for."""
    parser = ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--strategy", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the strategies named (repeatable)"
    )
    add("--config", action="append", default=[], metavar="FILE", help="an average in a config file (repeatable)")
    add("--seeds", type=int, default=5, metavar="N", help="runs for each schedule (default: 5)")
    add("--epochs", type=int, default=10, metavar="N", help="passes over the data (default: 10)")
    add("--out", type=Path, default=Path("demo.png"), metavar="FILE", help="the picture (default: demo.png)")
    add("--overview", type=Path, metavar="FILE", help="a smaller picture, of ema, swa and what can be chosen later")
    return parser.parse_args(argv)


def chosen(args: Namespace, total: int) -> list[Contender]:
    """Return the averages to compare.

    Raises:
        PolyakError: Something cannot be used, with words for what.
    """
    for option, value in (("--seeds", args.seeds), ("--epochs", args.epochs)):
        if value < 1:
            raise ConfigError(f"{option} {value}: expected 1 or more")
    if args.set and not args.strategy:
        raise ConfigError(f"--set {args.set[0]}: name the strategy that it is for, such as --strategy ema")
    formats = Figure().canvas.get_supported_filetypes()
    for option, file in (("--out", args.out), ("--overview", args.overview)):
        if file is None:
            continue
        if file.suffix[1:].lower() not in formats:
            raise ConfigError(
                f"{option} {file}: expected a file name that ends in one of .{', .'.join(sorted(formats))}"
            )
        if not file.parent.is_dir() or file.is_dir():
            raise ConfigError(f"{option} {file}: expected a file in a directory that exists")
    found = named(args.strategy, parsed(args.set), total) + from_files(args.config) or every_strategy(total)
    twice = [label for label, count in Counter(contender.label for contender in found).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]!r} was asked for twice; a name stands for one line of the table")
    return found


def compare(
    console: Console, contenders: list[Contender], digits: Digits, args: Namespace
) -> tuple[dict[str, list[Run]], Afterwards]:
    """Train once for each seed and schedule and once for the record, with a progress bar where somebody can see it."""
    runs: dict[str, list[Run]] = {schedule: [] for schedule in SCHEDULES}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        batches = args.seeds * len(SCHEDULES) * digits.batches + digits.choosing().batches
        task = progress.add_task("", total=args.epochs * batches)
        tick = partial(progress.advance, task)
        for seed in range(args.seeds):
            for schedule, made in runs.items():
                progress.update(task, description=f"seed {seed}, {schedule} learning rate")
                made.append(train(digits, contenders, schedule=schedule, seed=seed, epochs=args.epochs, tick=tick))
        progress.update(task, description="one run, recorded")
        return runs, afterwards(digits, seed=0, epochs=args.epochs, tick=tick)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    args = arguments(argv)
    torch.set_num_threads(1)  # the network is too small to be shared between cores
    digits = Digits.load()
    total = args.epochs * digits.batches
    try:
        contenders = chosen(args, total)
    except (PolyakError, RuntimeError) as error:  # torch's own, for a device that is not there
        print(f"digits.py: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a file has room for the whole table
    console.print(
        f"{len(digits.labels)} digits to learn, {len(digits.test_labels)} to test. Seeds: {args.seeds}, "
        f"schedules: {len(SCHEDULES)}, steps: {total}, averages: {len(contenders)}"
    )
    runs, chosen_later = compare(console, contenders, digits, args)
    for schedule, made in runs.items():
        console.print(table(schedule, made, contenders))
    console.print(NOTES)
    console.print(f"\nThe best average you could have chosen\n{chosen_later.words}\n")
    console.print(chosen_later.table, chosen_later.notes, sep="\n")
    picture(runs, contenders, chosen_later, args.out)
    console.print(f"Picture: {args.out}")
    if args.overview is not None:
        overview(runs, chosen_later, args.overview)
    return 0


if __name__ == "__main__":
    sys.exit(main())
