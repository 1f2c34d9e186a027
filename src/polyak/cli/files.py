"""``polyak average``, ``inspect`` and ``diff``: one checkpoint of many, what a file is, and how far two are apart."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyak.cli.arguments import settings
from polyak.cli.merge import numbers
from polyak.cli.outputs import check_picture, picture
from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show
from polyak.errors import ConfigError
from polyak.errors.formatting import byte_size, shortened

if TYPE_CHECKING:
    from polyak.files import Averaged, Checkpoint

__all__ = ["average", "diff", "inspect"]

Files = Annotated[list[Path], typer.Argument(metavar="FILE ...", help="Checkpoints: files, or folders.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")]
Key = Annotated[str | None, typer.Option(help="Where the weights are in a dictionary, such as ema or state.model.")]
_SHOWN = 12


def average(  # noqa: PLR0913, PLR0917 - each is one axis, and users complete from this signature
    files: Files,
    output: Output,
    last: Annotated[int | None, typer.Option(help="Only so many of the largest steps.")] = None,
    best: Annotated[int | None, typer.Option(help="Only so many of the best metrics.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="A JSON file: the metric of each file, by its name.")] = None,
    mode: Annotated[Literal["min", "max"], typer.Option(help="Whether small metrics are good, or large ones.")] = "min",
    until: Annotated[int | None, typer.Option(help="Only files up to this step.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="W1,W2,...", help="What each file counts.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide --weights by their sum.")] = False,  # noqa: FBT002 - a flag
    strategy: Annotated[str | None, typer.Option(help="A strategy, whose shares over the files' steps count.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of it. May be repeated.")
    ] = None,
    wsm: Annotated[
        Literal["linear", "minus_sqrt", "cosine"] | None,
        typer.Option(help="Weights in the shape of a decay of the learning rate."),
    ] = None,
    key: Key = None,
    match: Annotated[
        Literal["same", "common"], typer.Option(help="common: leave out tensors that some files lack.")
    ] = "same",
    integers: Annotated[
        Literal["last", "equal", "first"], typer.Option(help="Whose integers and booleans are taken.")
    ] = "last",
    nonfinite: Annotated[Literal["raise", "propagate"], typer.Option(help="What to do about NaN.")] = "raise",
    dtype: Annotated[str, typer.Option(help="The dtype of floats (default: the widest of the files).")] = "same",
    lora: Annotated[
        Literal["concatenate", "svd", "factors"] | None, typer.Option(help="How to average adapters.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The rank of --lora svd.")] = None,
    shard_size: Annotated[str, typer.Option(help="The largest file in a folder.")] = "5GB",
    threads: Annotated[int | None, typer.Option(help="Threads (default: one per processor).")] = None,
    hashes: Annotated[bool, typer.Option(help="Take the sha256 of each file, for the metadata.")] = True,  # noqa: FBT002 - a flag
) -> None:
    """Average checkpoints into one, in memory that does not grow with them; nothing in them is executed."""
    from polyak.files import average as averaged

    with errors_reported():
        made = averaged(
            files, _weights(weights, strategy, set_ or [], wsm), out=output, last=last, best=best, metrics=metrics,
            mode=mode, until=until, key=key, match=match, integers=integers, nonfinite=nonfinite, dtype=dtype,
            normalize=normalize, lora=lora, rank=rank, shard_size=shard_size, threads=threads, hashes=hashes,
        )  # fmt: skip
        tell(made)


def inspect(
    files: Files,
    key: Key = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Say of checkpoints what they are: format, tensors, dtypes, step, tied groups, and how they were averaged."""
    from polyak.files import open as opened

    with errors_reported():
        for number, file in enumerate(files):
            with opened(file, key) as checkpoint:
                typer.echo("\n" * bool(number), nl=False)
                for label, text in _described(checkpoint):
                    typer.echo(f"{label:<10}{text}")
                if tensors:
                    rows = [
                        (name, _dtype(checkpoint, name), str([*checkpoint.shape(name)])) for name in checkpoint.names
                    ]
                    show(Listing(("tensor", "dtype", "shape"), rows, wraps=0))


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same model.")],
    key: Key = None,
    number: Annotated[int, typer.Option("--number", "-n", help="How many tensors to list; 0: all.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file: the distance by depth.")] = None,
) -> None:
    """Compare two checkpoints tensor by tensor, those that are farthest apart first."""
    from polyak.files import diff as compared
    from polyak.files.difference import missing

    with errors_reported():
        check_picture(plot)
        found = compared(first, second, key=key)
        rows = [
            (one.name, f"{one.relative:.3g}", f"{one.distance:.3g}", f"{one.cosine:.6f}", f"{one.largest:.3g}")
            for one in [*found.sorted()[: number or None], found.whole]
        ]
        show(Listing(("tensor", "relative distance", "distance", "cosine", "largest"), rows, wraps=0))
        if number and len(found.tensors) > number:
            typer.echo(f"the first {number} of {len(found.tensors)} tensors; --number 0 lists all")
        for line in missing(found):
            typer.echo(line)
        if plot is not None:
            picture(plot, found.plot, f"From {first.name} to {second.name}: relative distance of each tensor")
            typer.echo(f"drawn: {plot}")


def tell(made: Averaged) -> None:
    """Print what was averaged."""
    pairs = zip(made.files, made.steps, made.weights, strict=True)
    rows = [(file.name, "-" if step is None else str(step), f"{weight:.4f}") for file, step, weight in pairs]
    show(Listing(("file", "step", "weight"), rows, wraps=0))
    for note in made.notes:
        typer.echo(f"note: {note}")
    files = [made.out] if made.out.is_file() else [path for path in made.out.rglob("*") if path.is_file()]
    typer.echo(f"written: {made.out} ({byte_size(sum(path.stat().st_size for path in files))})")


def _weights(weights: str | None, strategy: str | None, words: list[str], wsm: str | None) -> Any:  # noqa: ANN401 - any plain value
    given = [
        name for name, value in (("--weights", weights), ("--strategy", strategy), ("--wsm", wsm)) if value is not None
    ]
    if len(given) > 1:
        message = f"{' and '.join(given)} exclude each other; give one of them"
        raise ConfigError(message)
    if words and strategy is None:
        message = "--set belongs to a strategy; give its name: --strategy ema_halflife"
        raise ConfigError(message)
    if strategy is not None:
        return {"name": strategy, **settings(words)}
    if wsm is not None:
        from polyak.files import WSM

        return WSM.model_validate({"decay": wsm})
    if weights is None:
        return "uniform"
    return numbers(weights)


def _described(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    names = checkpoint.names
    values = sum(math.prod(checkpoint.shape(name)) for name in names)
    nbytes = sum(math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize for name in names)
    kinds = Counter(_dtype(checkpoint, name) for name in names)
    lines = [
        ("file", str(checkpoint.path)),
        ("format", checkpoint.format + (f", under the key {checkpoint.key!r}" if checkpoint.key else "")),
        ("tensors", f"{len(names)} of {values:,} values, {byte_size(nbytes)}"),
        ("dtypes", ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())),
        ("step", "unknown" if checkpoint.step is None else str(checkpoint.step)),
    ]
    lines += [("tied", " = ".join(group)) for group in checkpoint.tied[:_SHOWN]]
    lines += [("note", note) for note in checkpoint.notes]
    if checkpoint.made is not None:
        kind, about = checkpoint.made
        lines.append(("made", f"{kind.replace('_', ' ')} of polyak {about.get('polyak')}"))
        lines += [("", line) for line in _inputs(about)]
    return lines


def _inputs(about: Any) -> list[str]:  # noqa: ANN401 - any plain value
    inputs = about.get("inputs") if isinstance(about.get("inputs"), list) else []
    weights = about.get("weights") if isinstance(about.get("weights"), list) else []
    lines = []
    for number, one in enumerate(inputs):
        weight = f"{weights[number]:.4f} × " if number < len(weights) and isinstance(weights[number], float) else ""
        step = f", step {one['step']}" if one.get("step") is not None else ""
        digest = f", sha256 {str(one['sha256'])[:12]}…" if "sha256" in one else ""
        lines.append(f"{weight}{one.get('path')}{step}{digest}")
    return shortened(lines, _SHOWN, "\n").splitlines()


def _dtype(checkpoint: Checkpoint, name: str) -> str:
    return str(checkpoint.dtype(name)).removeprefix("torch.")
