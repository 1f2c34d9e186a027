"""``polyak.files.merge``: one checkpoint of several, by any installed merge."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import brief, listed, shown
from polyak.files.average import check_options, dtype_edits, notes_of
from polyak.files.inputs import opened
from polyak.files.make import Job, Request, make
from polyak.files.merge_inputs import check_count, completed, notes_on_base, opened_extras, refuse_lora, shares_for
from polyak.files.merging import Merging, measured
from polyak.files.plan import as_dtype, planned
from polyak.files.writing.target import check_spared
from polyak.merges.base import Merge
from polyak.registry import registry
from polyak.strategy.frozen import line
from polyak.strategy.numbers import given_integer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch

    from polyak.files.plan import Integers, Match
    from polyak.registry import Merges

__all__ = ["Merged", "as_merge", "merge", "merges"]


@dataclass(frozen=True)
class Merged:
    """The inputs of a merge, and its file.

    Attributes:
        out: The file or folder that was written.
        method: The merge, with its settings.
        files: The inputs, in order.
        weights: What each counts.
        notes: What a user should know.
    """

    out: Path
    method: Merge
    files: tuple[Path, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...]


def merges() -> Merges:
    """Return all merges that can be chosen by name: a mapping of names to classes.

    Examples:
        >>> from polyak import files
        >>> list(files.merges())[:3]
        ['linear', 'task_arithmetic', 'slerp']
    """
    return registry().merges()


def as_merge(method: str | Merge | type[Merge] | Mapping[str, Any], settings: Mapping[str, Any]) -> Merge:
    """Return a merge by its name and settings.

    Raises:
        UnknownMergeError: If no plugin offers the name.
        ConfigError: If a setting is missing, unknown or out of its range.
    """
    if isinstance(method, Merge):
        if settings:
            message = f"the settings {listed(settings)} came with {shown(method)}; set them on it instead"
            raise ConfigError(message)
        return method
    if isinstance(method, Mapping):
        settings = {**{key: value for key, value in method.items() if key != "name"}, **settings}
        method = str(method.get("name", ""))
    cls = registry().resolve_merge(method) if isinstance(method, str) else method
    if not isinstance(cls, type) or not issubclass(cls, Merge):
        message = f"a merge is a name such as 'ties', a class or an object of polyak.files.Merge; got {shown(method)}"
        raise ArgumentError(message)
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        lines = [line(detail, cls._hint) for detail in error.errors()]
        name = cls.model_fields["name"].default
        raise ConfigError(brief("\n  ".join([f"the merge {name!r} cannot be used:", *lines]))) from error


def merge(  # noqa: PLR0913 - each is one axis, and users complete from this signature
    files: Iterable[str | os.PathLike[str]],
    method: str | Merge | type[Merge] | Mapping[str, Any],
    *,
    base: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    seed: int = 0,
    key: str | None = None,
    match: Match = "same",
    integers: Integers = "last",
    nonfinite: Literal["raise", "propagate"] = "raise",
    dtype: str | torch.dtype = "same",
    shard_size: int | str | None = None,
    threads: int | None = None,
    hashes: bool = True,
    **settings: Any,
) -> Merged:
    """Merge checkpoints into one by any installed method, in float64, rounded once.

    Methods that work value by value are given pieces, in memory that does not grow with the files. Others are given one
    whole tensor after the other.

    Args:
        files: The checkpoints that are merged, without the base.
        method: A name such as ``"ties"``, a class, an object, or a mapping of a name and settings.
        base: The checkpoint that they were fine-tuned from, for methods that take one.
        out: The output, as in ``polyak.files.average``.
        weights: What each file counts. Defaults to equal parts of a mean, or to 1 for methods that add up changes.
        normalize: Whether to divide the weights by their sum.
        seed: The seed of methods that draw: the same seed gives the same bits.
        key: As in ``polyak.files.average``; so are the options below.
        match: See there.
        integers: See there.
        nonfinite: See there.
        dtype: See there.
        shard_size: See there.
        threads: See there.
        hashes: See there.
        **settings: The method's own settings.

    Raises:
        UnknownMergeError: If no plugin offers the method.
        ConfigError: If an option or a setting is wrong, or a base is missing or too many.
        StateError: If a file is missing, damaged, malicious or no checkpoint.
        MismatchError: If names or shapes differ.
        NonFiniteError: If a file or the result has a NaN or an infinity.
        WriteError: If the output cannot be written.

    Nothing is left behind when one is raised.

    Examples:
        >>> import tempfile, torch
        >>> from polyak import files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, value in {"base": 1.0, "a": 2.0, "b": 4.0}.items():
        ...         torch.save({"w": torch.full((2,), value)}, f"{folder}/{name}.pt")
        ...     inputs = [f"{folder}/a.pt", f"{folder}/b.pt"]
        ...     made = files.merge(inputs, "task_arithmetic", lam=0.5, base=f"{folder}/base.pt", out=f"{folder}/o.pt")
        ...     print(torch.load(made.out)["w"])
        tensor([3., 3.])
    """
    chosen = as_merge(method, settings)
    check_options(match, integers, nonfinite)
    number = given_integer("seed", seed, 0)
    kind, request = as_dtype(dtype), Request.of(out, threads, shard_size, integers, hashes=hashes)
    with ExitStack() as held:
        inputs = held.enter_context(opened(files, key))
        check_count(chosen, inputs, base)
        extras = opened_extras(chosen, inputs, held, key)
        bases = held.enter_context(opened([] if base is None else [base], key))
        check_spared(request.out, [*inputs, *bases, *extras])
        refuse_lora([*inputs, *bases])
        shares = shares_for(chosen, weights, len(inputs), normalize=normalize)
        entries, notes = planned([*inputs, *bases], match=match, integers=integers, dtype=None)
        entries = [completed(entry, len(inputs), extras, kind, integers) for entry in entries]
        merging = Merging(chosen, tuple(shares), len(inputs), len(bases), number, raises=nonfinite == "raise")
        merging = replace(merging, statistics=measured(merging, entries))
        record = {
            "method": chosen.model_dump(mode="json"), "weights": shares, "seed": number,
            "base": str(base) if base is not None else None,
            "settings": {"key": key, "match": match, "integers": integers, "nonfinite": nonfinite, "dtype": str(dtype)},
        }  # fmt: skip
        request = request if chosen.in_pieces() else replace(request, threads=1)  # one tensor at a time in memory
        everything = [*inputs, *bases, *extras]
        job = Job(
            "polyak_merge", everything, entries, merging.combine, record, inputs[-1], {}, dtype_edits(inputs[-1], kind)
        )
        make(job, request)
        notes += [*notes_on_base(inputs, bases), *notes_of(everything)]
        return Merged(
            request.out, chosen, tuple(one.path for one in inputs), tuple(shares), tuple(dict.fromkeys(notes))
        )
