"""``polyak.files.average``: one checkpoint of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyak.errors import ConfigError
from polyak.errors.calls import explained
from polyak.errors.formatting import shown
from polyak.files.combine import Average
from polyak.files.inputs import check_enough, opened
from polyak.files.lora import combined
from polyak.files.make import Job, Request, make
from polyak.files.plan import as_dtype, planned
from polyak.files.select import selected
from polyak.files.weights import WSM, as_chosen, described, shares_of
from polyak.files.writing.target import check_spared
from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from polyak.files.checkpoint import Checkpoint
    from polyak.files.lora import Lora
    from polyak.files.plan import Integers, Match
    from polyak.files.weights import Weights

__all__ = ["Averaged", "average", "check_choice", "check_options", "dtype_edits", "notes_of"]


@dataclass(frozen=True)
class Averaged:
    """The inputs of an average, and its file.

    Attributes:
        out: The file or folder that was written.
        files: The inputs that were averaged, in order.
        steps: The step of each; None where nothing says it.
        weights: What each counts.
        notes: What a user should know.
    """

    out: Path
    files: tuple[Path, ...]
    steps: tuple[int | None, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...]


@explained("The output is given by name: polyak.files.average(files, out='average.safetensors')")
def average(  # noqa: PLR0913 - each is one axis of an average, and users complete from this signature
    files: Iterable[str | os.PathLike[str]],
    weights: Weights = "uniform",
    *,
    out: str | os.PathLike[str],
    last: int | None = None,
    best: int | None = None,
    metrics: Mapping[str, float] | str | os.PathLike[str] | None = None,
    mode: Literal["min", "max"] = "min",
    until: int | None = None,
    key: str | None = None,
    match: Match = "same",
    integers: Integers = "last",
    nonfinite: Literal["raise", "propagate"] = "raise",
    dtype: str | torch.dtype = "same",
    normalize: bool = False,
    lora: Lora | None = None,
    rank: int | None = None,
    shard_size: int | str | None = None,
    threads: int | None = None,
    hashes: bool = True,
) -> Averaged:
    """Average checkpoints into one, in memory that does not grow with them.

    Each value is ``sum(weight_i * value_i)`` in float64, rounded once. Files are read in pieces, each byte once; no
    pickle is executed. The output is whole or absent, and its metadata say how it was made.

    Args:
        files: Two checkpoints or more: files or folders of any format that ``polyak.files.open`` knows.
        weights: ``"uniform"``; numbers that add up to 1; a strategy by name, object, class or mapping, whose shares
            over the files' steps are taken; or ``polyak.files.wsm()``.
        out: A ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file, or a folder if the inputs are folders.
        last: Average so many of the largest steps only.
        best: Average so many of the best ``metrics`` only.
        metrics: A number for each file by name, or a JSON file of them.
        mode: Whether small metrics are good ("min") or large ones ("max").
        until: Leave out files of later steps.
        key: The path of keys to the weights in a dictionary, such as ``"ema"``. Defaults to the one that is usual.
        match: "same" refuses files with other names; "common" leaves out names that some lack.
        integers: What becomes of integers and booleans: those of the "last" or "first" file; "equal" refuses others.
        nonfinite: "raise" refuses a NaN or an infinity; "propagate" lets it into the result.
        dtype: The dtype of floats in the output. Defaults to the widest of the inputs.
        normalize: Whether to divide numbers by their sum.
        lora: How to average adapters: "concatenate" is exact and adds up their ranks; "svd" rounds the mean to
            ``rank``; "factors" averages the factors, for neighbouring files of one run. Without it they are refused.
        rank: The rank of ``lora="svd"``.
        shard_size: The largest file in an output folder, in bytes or as "5GB". Defaults to 5 GB.
        threads: On how many threads. Defaults to one per processor.
        hashes: Whether the sha256 of each input is taken while it is read, for the metadata.

    Raises:
        ConfigError: If an option is wrong, fewer than two files are left, one is given twice, or ``out`` is an input.
        StateError: If a file is missing, damaged, malicious or no checkpoint.
        MismatchError: If names, shapes or integers differ.
        NonFiniteError: If a file has a NaN or an infinity.
        WriteError: If the output cannot be written.

    Nothing is left behind when one is raised.

    Often confused with: ``polyak.average``, which averages a model while it trains.

    Examples:
        >>> import tempfile, torch
        >>> from polyak import files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [f"{folder}/step-{step}.pt" for step in (100, 200, 400)]
        ...     for value, name in enumerate(names):
        ...         torch.save({"w": torch.full((2,), float(value))}, name)
        ...     made = files.average(names, {"name": "ema_halflife", "halflife": 100}, out=f"{folder}/ema.pt")
        ...     print(made.weights, torch.load(made.out)["w"])
        (0.125, 0.125, 0.75) tensor([1.6250, 1.6250])
    """
    chosen = as_chosen(weights)
    check_options(match, integers, nonfinite)
    kind = as_dtype(dtype)
    request = Request.of(out, threads, shard_size, integers, hashes=hashes)
    with opened(files, key) as found:
        check_enough(found)
        by_step = isinstance(chosen, (WSM, Strategy))
        inputs = selected(found, last=last, best=best, metrics=metrics, mode=mode, until=until, by_step=by_step)
        check_enough(inputs)
        check_spared(request.out, found)
        steps = tuple(one.step for one in inputs)
        shares = shares_of(chosen, steps, normalize=normalize)
        adapters = combined(inputs, shares, lora, rank, kind)
        entries, notes = planned(inputs, match=match, integers=integers, dtype=kind, skip=adapters.names)
        record = {
            "weights": shares, "steps": steps, "rule": described(chosen),
            "settings": {
                "last": last, "best": best, "until": until, "key": key, "match": match, "integers": integers,
                "nonfinite": nonfinite, "dtype": str(dtype), "lora": lora, "rank": rank,
            },
        }  # fmt: skip
        job = Job(
            "polyak_average", inputs, entries, lambda: Average(shares, raises=nonfinite == "raise"), record, inputs[-1],
            adapters.tensors, {**dtype_edits(inputs[-1], kind), **adapters.edits},
        )  # fmt: skip
        notes += [*_copies(inputs, make(job, request)), *adapters.notes, *notes_of(inputs)]
        return Averaged(
            request.out, tuple(one.path for one in inputs), steps, tuple(shares), tuple(dict.fromkeys(notes))
        )


def _copies(inputs: Sequence[Checkpoint], sums: Mapping[str, str]) -> list[str]:
    """Return that some files are copies of others, which count twice."""
    known: dict[tuple[str, ...], str] = {}
    notes = []
    for one in inputs:
        digests = tuple(sums[str(file.path)] for file in one.raw_files()) if sums else ()
        if digests in known:
            notes.append(f"{one.path.name} has the same bytes as {known[digests]}, which so count twice")
        elif digests:
            known[digests] = one.path.name
    return notes


def dtype_edits(model: Checkpoint, dtype: torch.dtype | None) -> dict[str, dict[str, str]]:
    """Return the change of a folder's config that another dtype of its weights needs."""
    names = [name for name in ("torch_dtype", "dtype") if name in model.config]
    return {"config.json": dict.fromkeys(names, str(dtype).removeprefix("torch."))} if dtype and names else {}


def notes_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the notes on each file, with its name."""
    return [f"{one.path.name}: {note}" for one in checkpoints for note in one.notes]


def check_options(match: object, integers: object, nonfinite: object) -> None:
    """Refuse unknown choices.

    Raises:
        ConfigError: If ``match``, ``integers`` or ``nonfinite`` is none of its choices.
    """
    check_choice("match", match, ("same", "common"))
    check_choice("integers", integers, ("last", "equal", "first"))
    check_choice("nonfinite", nonfinite, ("raise", "propagate"))


def check_choice(option: str, given: object, known: tuple[str, ...]) -> None:
    """Refuse what is no choice.

    Raises:
        ConfigError: If it is none.
    """
    if given not in known:
        message = f"{option}: got {shown(given)}; expected {' or '.join(map(repr, known))}"
        raise ConfigError(message)
