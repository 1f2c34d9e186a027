"""``polyak merge`` and ``merges``: one checkpoint of several, by any installed merge."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyak.cli.arguments import settings
from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show
from polyak.errors import ConfigError
from polyak.errors.formatting import byte_size

if TYPE_CHECKING:
    from polyak.merges.base import Merge

__all__ = ["list_merges", "merge", "numbers"]


def merge(  # noqa: PLR0913, PLR0917 - each is one axis, and users complete from this signature
    method: Annotated[str, typer.Argument(help="A merge; polyak merges lists them.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE ...", help="Checkpoints, without the base.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")],
    base: Annotated[Path | None, typer.Option(help="The checkpoint that they were fine-tuned from.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the merge. May be repeated.")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="W1,W2,...", help="What each file counts.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide --weights by their sum.")] = False,  # noqa: FBT002 - a flag
    seed: Annotated[int, typer.Option(help="The seed of merges that draw.")] = 0,
    key: Annotated[str | None, typer.Option(help="Where the weights are in a dictionary, such as ema.")] = None,
    match: Annotated[
        Literal["same", "common"], typer.Option(help="common: leave out tensors that some files lack.")
    ] = "same",
    integers: Annotated[
        Literal["last", "equal", "first"], typer.Option(help="Whose integers and booleans are taken.")
    ] = "last",
    nonfinite: Annotated[Literal["raise", "propagate"], typer.Option(help="What to do about NaN.")] = "raise",
    dtype: Annotated[str, typer.Option(help="The dtype of floats (default: the widest of the files).")] = "same",
    shard_size: Annotated[str, typer.Option(help="The largest file in a folder.")] = "5GB",
    threads: Annotated[int | None, typer.Option(help="Threads (default: one per processor).")] = None,
    hashes: Annotated[bool, typer.Option(help="Take the sha256 of each file, for the metadata.")] = True,  # noqa: FBT002 - a flag
) -> None:
    """Merge fine-tuned checkpoints into one: task arithmetic, TIES, DARE, SLERP and others."""
    from polyak.files import merge as merged
    from polyak.files.merge import as_merge

    with errors_reported():
        chosen = as_merge(method, settings(set_ or []))
        shares = None if weights is None else numbers(weights)
        made = merged(
            files, chosen, base=base, out=output, weights=shares, normalize=normalize, seed=seed, key=key, match=match,
            integers=integers, nonfinite=nonfinite, dtype=dtype, shard_size=shard_size, threads=threads, hashes=hashes,
        )  # fmt: skip
        rows = [(file.name, f"{weight:.4f}") for file, weight in zip(made.files, made.weights, strict=True)]
        show(Listing(("file", "weight"), rows, wraps=0))
        for note in made.notes:
            typer.echo(f"note: {note}")
        written = [made.out] if made.out.is_file() else [path for path in made.out.rglob("*") if path.is_file()]
        typer.echo(f"written: {made.out} ({byte_size(sum(path.stat().st_size for path in written))})")


def list_merges() -> None:
    """List all merges: name, base, settings with defaults, source, and the distribution that offers each."""
    from polyak.files import merges

    with errors_reported():
        known = merges()
        rows = [
            (name, known.distribution(name), cls.base, cls.source or "-", _settings(cls)) for name, cls in known.items()
        ]
    show(Listing(("merge", "offered by", "base", "source", "settings"), rows, wraps=3))


def numbers(text: str) -> list[float]:
    """Return the numbers in a text with commas between them.

    Raises:
        ConfigError: If there are others.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        message = f"--weights: got {text!r}; expected numbers with commas between, as in 0.2,0.3,0.5"
        raise ConfigError(message) from error


def _settings(cls: type[Merge]) -> str:
    def said(name: str, field: Any) -> str:  # noqa: ANN401 - any plain value
        return f"{name} (required)" if field.is_required() else f"{name}={field.default!r}"

    return ",\n".join(said(name, field) for name, field in cls.model_fields.items() if name != "name") or "-"
