"""Averages in folders of ``torch.distributed.checkpoint``: written by all ranks, read by any number of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from polyak.distributed.atomic_folder import KEY, AtomicFolder
from polyak.distributed.dcp_errors import metadata, raised_as
from polyak.distributed.sync import asked, check_counters, check_one_average, members, rank
from polyak.engine.averager import refuse_other
from polyak.errors import DistributedError, StateError
from polyak.errors.formatting import shortened

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import Metadata

    from polyak.engine.averager import Averager
    from polyak.engine.bank import Bank

__all__ = ["load", "save"]

T = TypeVar("T")

_SHOWN = 6


def save(averager: Averager | Bank, folder: str | os.PathLike[str], *, group: ProcessGroup | None = None) -> None:
    """Write an averager or a bank into a folder, whole or not at all; all ranks that share it call this.

    Each rank writes its own shards to a scratch folder, which is renamed at the end. Until then an earlier folder of
    that name stays unchanged, wherever the run is interrupted. The first rank of ``group`` writes every tensor that
    all ranks hold. The statistics of batch norm, which DDP leaves to each rank, therefore come from one rank.

    Before anything is written, the ranks compare digests of their averaged parameters, which reads each once.

    Args:
        averager: This rank's averager or bank, sharded or not.
        folder: A folder that all ranks see.
        group: The ranks that share it, such as a stage of a pipeline. Defaults to all.

    Raises:
        DistributedError: If a rank is gone or cannot write, or if ranks disagree about the strategy, steps, updates
            or averaged parameters. It names the ranks and tensors; the folder is what it was.

    Often confused with: ``polyak.save``, by which one process writes one file. ``torch.distributed.checkpoint.save``
    of ``{"averager": averager, "model": …}`` writes the same next to the model's parts, but into the folder itself. It
    divides replicated tensors among ranks unless ``planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True)``.

    Examples:
        >>> import polyak, tempfile, torch
        >>> averager, other = (polyak.average(torch.nn.Linear(2, 1), "swa") for _ in range(2))
        >>> averager.update()
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     polyak.distributed.save(averager, f"{scratch}/average")
        ...     polyak.distributed.load(other, f"{scratch}/average")
        >>> other.n
        1
    """
    refuse_other("distributed.save", averager, folder, "folder")
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    check_counters(averager, f"save to {str(folder)!r}", group)
    check_one_average(averager, f"save to {str(folder)!r}", group)
    place, ranks = AtomicFolder(Path(folder).absolute()), members(group)
    with ExitStack() as held:
        scratch = _on_first(lambda: place.prepare(held), f"prepare {str(folder)!r}", group)
        with raised_as(f"write {str(folder)!r}", DistributedError, "It is what it was before.", ranks):
            # By default replicated tensors are divided among ranks by size: one layer's statistics would mix two ranks.
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            dcp_save({KEY: averager.state_dict()}, checkpoint_id=scratch, planner=planner, process_group=group)
        _on_first(lambda: place.publish(scratch), f"name {str(folder)!r}", group)


def load(averager: Averager | Bank, folder: str | os.PathLike[str], *, group: ProcessGroup | None = None) -> None:
    """Resume exactly where ``save`` stopped, on however many ranks; all ranks that share it call this.

    Each rank reads what it needs: from one process to many and back, between FSDP2, DDP and plain models.

    Args:
        averager: An averager of the same model and strategy, or a bank of them, sharded or not.
        folder: What ``save`` wrote.
        group: The ranks that share it. Defaults to all.

    Raises:
        StateError: If there is no such folder, or it is damaged, lacks tensors, or is of another model or strategy.
        DistributedError: If a rank is gone.

    After an error nothing was changed.

    Examples:
        >>> import polyak, torch
        >>> averager = polyak.average(torch.nn.Linear(2, 1), "swa")
        >>> polyak.distributed.load(averager, "missing")
        Traceback (most recent call last):
        polyak.errors.StateError: 'missing' cannot be loaded: there is no such folder. Nothing was loaded.
    """
    refuse_other("distributed.load", averager, folder, "folder")
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    place = AtomicFolder(Path(folder).absolute())
    _on_first(place.recover, f"look for {str(folder)!r}", group)
    found, problem = metadata(place.target)
    # Copies: DCP writes into its arguments even where it fails later.
    wanted, problems = ({}, [problem]) if found is None else _wanted(found, averager.state_dict())
    answers = asked(problems, group, f"load {str(folder)!r}")
    by_rank = {one: found for one, found in zip(members(group) or range(len(answers)), answers, strict=True) if found}
    if by_rank:
        one, problems = next(iter(by_rank.items()))
        where = "" if len(by_rank) == len(answers) else f" (rank {one})"
        message = f"{str(folder)!r} cannot be loaded{where}: {shortened(problems, _SHOWN, '; ')}. Nothing was loaded."
        raise StateError(message)
    rest = "Nothing was loaded. Load the one before it."
    with raised_as(f"read {str(folder)!r}", StateError, rest, members(group)):
        dcp_load(wanted, checkpoint_id=place.target, process_group=group)
    averager.load_state_dict(wanted[KEY])


def _wanted(found: Metadata, own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the state to fill from a folder, and the differences between its tensors and ours in words."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    wanted: dict[str, Any] = {}
    tensors = dict(_leaves(own, (KEY,)))
    problems = []
    paths: Mapping[str, tuple[Any, ...]] = found.planner_data or {}
    for key, saved in found.state_dict_metadata.items():
        path = tuple(paths.get(key, (key,)))
        if path[0] != KEY:
            continue  # a model, an optimiser: loaded by others
        value = None
        if isinstance(saved, TensorStorageMetadata):
            mine = tensors.pop(path, None)
            if mine is None or mine.shape != saved.size:
                what = "unknown" if mine is None else f"not of shape {tuple(mine.shape)} as here"
                problems.append(f"{_called(path)} of shape {tuple(saved.size)} is {what}")
                continue
            # In the dtype of the file: load_state_dict() decides how it is kept.
            value = torch.empty_like(mine, dtype=saved.properties.dtype)
        _put(wanted, path, value)
    if KEY not in wanted and not problems:
        return wanted, [f"it holds no {KEY!r}"]
    return wanted, [f"{_called(path)} is missing" for path in tensors] + problems


def _leaves(state: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from _leaves(value, (*path, key))


def _called(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path[1:]))


def _put(state: dict[str, Any], path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        state = state.setdefault(key, {})
    state[path[-1]] = value


def _on_first(act: Callable[[], T], purpose: str, group: ProcessGroup | None) -> T:
    """Run something on the first rank and return its result on all ranks.

    Raises:
        DistributedError: If it fails, or a rank does not answer.
    """
    first, problem, done = (members(group) or [0])[0], "", None
    if rank() == first:
        try:
            done = act()
        except Exception as error:  # noqa: BLE001 - the others wait for an answer
            problem = f"rank {first} could not {purpose}: {type(error).__name__}: {error}"
    answers = asked((problem, done), group, purpose)
    if problem := "".join(problem for problem, _ in answers):
        raise DistributedError(problem)
    found: T = answers[0][1]
    return found
