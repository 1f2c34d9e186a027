"""``polyak snapshots``, ``synthesize`` and ``sweep``: the average of a recorded run, chosen after the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from polyak.cli.arguments import grid, settings, with_start
from polyak.cli.functions import function_called
from polyak.cli.outputs import check_picture, check_tensors, picture
from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show
from polyak.errors import ConfigError
from polyak.errors.formatting import byte_size
from polyak.plot import POOR
from polyak.posthoc import Store, sweep as swept
from polyak.posthoc.labels import label
from polyak.posthoc.synthesis import combine, nearest, target_profile, warn_of_poor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.posthoc import Sweep
    from polyak.posthoc.least_squares import Fit
    from polyak.posthoc.snapshot import Snapshot
    from polyak.strategy.profile import Profile

__all__ = ["snapshots", "sweep", "synthesize"]

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that polyak.posthoc.Recorder wrote.")]
Words = list[str] | None
Settings = Annotated[
    Words, typer.Option("--set", metavar="KEY=VALUE", help="A setting, or start=, every= or origin=. May be repeated.")
]
AtStep = Annotated[int | None, typer.Option(help="The optimiser step of the average (default: the last snapshot's).")]
Nonnegative = Annotated[bool, typer.Option("--nonnegative", help="No negative coefficient (needs scipy).")]

_BETTER = {"min": "lower is better", "max": "higher is better"}
_SHOWN = 12  # snapshots
_LEAST = 1e-4  # the coefficient of one that is shown


def snapshots(directory: Directory) -> None:
    """List the snapshots of a recorded run."""
    with errors_reported():
        found, _ = Store(directory).until(None)
        rows = [_described(snapshot) for snapshot in found]
    show(Listing(("file", "average", "step", "half-life", "mean age", "size"), rows, wraps=0))
    total = sum(snapshot.path.stat().st_size for snapshot in found)
    typer.echo(f"{len(found)} snapshots, {byte_size(total)}, up to step {found[-1].step}")


def synthesize(
    directory: Directory,
    target: Annotated[str, typer.Option(help="The strategy whose average is wanted.")],
    set_: Settings = None,
    at_step: AtStep = None,
    nonnegative: Nonnegative = False,  # noqa: FBT002 - a flag
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .safetensors file to write.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report how good it would be.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Make an average that a run did not keep, from its snapshots."""
    with errors_reported():
        store = Store(directory)
        if output is None and not dry_run:
            message = "give the file to write, -o out.safetensors, or --dry-run"
            raise ConfigError(message)
        if not dry_run:
            check_tensors(output)
        chosen, step = store.until(at_step)
        _check_spared(output, chosen)
        config = with_start(settings(set_ or []), step)
        wanted = target_profile(target, config, store.snapshots, step)
        (found,) = nearest(chosen, [wanted], nonnegative=nonnegative)
        warn_of_poor(found, label({"name": target, **config}))
        _tell(found, chosen, wanted, step)
        if output is not None and not dry_run:
            combine(chosen, found, wanted, step).save(output)
            typer.echo(f"written: {output}")


def sweep(
    directory: Directory,
    function: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="It takes a state dict, returns a metric.")
    ],
    target: Annotated[
        str | None, typer.Option(help="A strategy (default: EMAs from 0.5 % to 50 % of the run).")
    ] = None,
    grid_: Annotated[
        Words, typer.Option("--grid", metavar="KEY=V1,V2,...", help="Values of a setting of it. May be repeated.")
    ] = None,
    set_: Settings = None,
    mode: Annotated[
        Literal["min", "max"], typer.Option(help="Whether a small metric is good, or a large one.")
    ] = "min",
    at_step: AtStep = None,
    nonnegative: Nonnegative = False,  # noqa: FBT002 - a flag
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file for the picture.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .safetensors file for the best (default: in DIR).")
    ] = None,
    resume: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--resume", help="Keep the metrics of an earlier sweep with this output.")
    ] = False,
) -> None:
    """Evaluate many averages of a recorded run by a function of yours, and keep the best."""
    with errors_reported():
        check_tensors(output)
        check_picture(plot)
        store = Store(directory)
        chosen, step = store.until(at_step)
        _check_spared(output, chosen)
        targets = _targets(target, grid_ or [], set_ or [], step)
        evaluate = function_called(function)
        found = swept(
            store, evaluate, targets, at_step=at_step, mode=mode, nonnegative=nonnegative, output=output,
            resume=resume,
        )  # fmt: skip
        _show(found)
        if plot is not None:
            name = function.partition(":")[2]
            title = f"The {name} of averages of one run, at step {step:,}"
            picture(plot, lambda axes: found.plot(axes, label=f"{name} ({_BETTER[mode]})"), title)
            typer.echo(f"drawn: {plot}")
        if found.file is None:
            raise typer.Exit(2)  # a warning has said why


def _targets(target: str | None, grids: list[str], fixed: list[str], step: int) -> list[dict[str, Any]] | None:
    if target is None:
        if grids or fixed:
            message = "--grid and --set belong to a strategy; give its name: --target ema_halflife"
            raise ConfigError(message)
        return None
    own, points = settings(fixed), grid(grids)
    if twice := sorted(own.keys() & points[0].keys()):
        message = f"{', '.join(map(repr, twice))} given by --set and by --grid; give it once"
        raise ConfigError(message)
    return [{"name": target, **with_start({**own, **point}, step)} for point in points]


def _check_spared(output: Path | None, chosen: Sequence[Snapshot]) -> None:
    if output is not None and output.resolve() in {snapshot.path.resolve() for snapshot in chosen}:
        message = f"{output} is one of the snapshots; give another file"
        raise ConfigError(message)


def _tell(found: Fit, chosen: Sequence[Snapshot], wanted: Profile, step: int) -> None:
    pairs = [(snapshot, float(x)) for snapshot, x in zip(chosen, found.coefficients, strict=True) if x]
    used = sorted(
        (pair for pair in pairs if abs(pair[1]) >= _LEAST), key=lambda pair: (-round(abs(pair[1]), 9), -pair[0].step)
    )
    rows = [(one.path.name, str(one.step), f"{x:+.4f}") for one, x in used[:_SHOWN]]
    show(Listing(("snapshot", "step", "coefficient"), rows, wraps=0))
    if len(pairs) > len(rows):
        largest = next((f"the largest {x:+.4f}" for _, x in used[_SHOWN:]), f"none as large as {_LEAST:g}")
        typer.echo(f"and {len(pairs) - len(rows)} more, {largest}")
    typer.echo(f"at step         {step}")
    typer.echo(f"profile error   {found.error:.2g}  (part of the wanted profile's norm)")
    typer.echo(f"amplification   {found.amplification:.3g}  (sum of |coefficient|; 1: none is negative)")
    typer.echo(f"rounding        {found.rounding:.1g}  (of the weights: amplification times the snapshots' own)")
    if wanted.start > POOR**2 and not any(snapshot.profile.start for snapshot in chosen):
        typer.echo(
            f"The wanted average counts the weights at the start {wanted.start:.0%}, and no snapshot has them; "
            "--set origin=first leaves them out."
        )


def _show(found: Sweep) -> None:
    typer.echo(found.table())
    if poor := sum(row.profile_error > POOR for row in found.rows):
        typer.echo(
            f"{poor} target{'s' * (poor > 1)} (profile error above {POOR:g}) could not be rebuilt accurately; "
            "metrics there belong to different averages."
        )
    if len(found.rows) > 1 and found.best in {found.rows[0], found.rows[-1]}:
        typer.echo("The best one is at the end of what was tried; a better one may lie beyond.")
    typer.echo(f"best: {found.best.label}, written: {found.file or 'nowhere'}")


def _described(snapshot: Snapshot) -> tuple[str, ...]:
    half_life, mean_age = (float(snapshot.about.summary.get(key, "nan")) for key in ("half_life", "mean_age"))
    nbytes = byte_size(snapshot.path.stat().st_size)
    return snapshot.path.name, snapshot.average, str(snapshot.step), _age(half_life), _age(mean_age), nbytes


def _age(age: float) -> str:
    return "-" if np.isnan(age) else f"{age:.0f}"
