"""Averages in folders of ``torch.distributed.checkpoint``: written by all ranks, read by any number of them."""

from __future__ import annotations

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from polyak.distributed.sync import asked
from polyak.errors import DistributedError, StateError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["load", "save"]

_KEY = "averager"
_SHOWN = 6


class _Stateful(Protocol):
    """An averager or a bank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def save(averager: _Stateful, folder: str | os.PathLike[str]) -> None:
    """Write an averager or a bank into a folder, whole or not at all; all ranks call it.

    Each rank writes its own shards beside the folder, which then gets its name. Until then a folder of that name that
    was there before stays what it is, wherever the run is cut off.

    Args:
        averager: This rank's averager or bank, sharded or not.
        folder: A folder that all ranks see.

    Raises:
        DistributedError: A rank is gone, or could not write; the folder is what it was.

    Often confused with: ``polyak.save``, by which one process writes one file. ``torch.distributed.checkpoint.save``
    of ``{"averager": averager, "model": …}`` writes the same, beside the model's parts, but into the folder itself.

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
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    target = Path(folder).absolute()
    scratch, old = _beside(target, "new"), _beside(target, "old")

    def prepare() -> None:
        _recover(target)
        _check_replaceable(target)
        shutil.rmtree(scratch, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)

    def publish() -> None:
        if target.exists():
            target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    _on_first(prepare, f"prepare {str(folder)!r}")
    with _translated(f"write {str(folder)!r}", DistributedError, "It is what it was before."):
        dcp_save({_KEY: averager.state_dict()}, checkpoint_id=scratch)
    _on_first(publish, f"name {str(folder)!r}")


def load(averager: _Stateful, folder: str | os.PathLike[str]) -> None:
    """Go on exactly where ``save`` left off, on however many ranks; all ranks call it.

    Each rank reads what it needs: from one process to many and back, between FSDP2, DDP and plain models.

    Args:
        averager: An averager of the same model and strategy, or such a bank, sharded or not.
        folder: What ``save`` wrote.

    Raises:
        StateError: There is no such folder, or it is damaged, lacks tensors, or is of another model or strategy.
        DistributedError: A rank is gone.

    Nothing is changed when one is raised.

    Examples:
        >>> import polyak, torch
        >>> averager = polyak.average(torch.nn.Linear(2, 1), "swa")
        >>> polyak.distributed.load(averager, "missing")
        Traceback (most recent call last):
        polyak.errors.StateError: 'missing' cannot be loaded: there is no such folder. Nothing was loaded.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    target = Path(folder).absolute()
    _on_first(lambda: _recover(target), f"look for {str(folder)!r}")
    metadata, problem = _metadata(FileSystemReader(target), target)
    # Copies: DCP writes into what it is given, whatever becomes of the rest.
    wanted, problems = ({}, [problem]) if metadata is None else _wanted(metadata, averager.state_dict())
    everyones = {rank: told for rank, told in enumerate(asked(problems, None, f"load {str(folder)!r}")) if told}
    if everyones:
        rank, told = next(iter(everyones.items()))
        shown = "; ".join(told[:_SHOWN]) + (f" … and {len(told) - _SHOWN} more" if len(told) > _SHOWN else "")
        where = "" if len(everyones) == _ranks() else f" (rank {rank})"
        message = f"{str(folder)!r} cannot be loaded{where}: {shown}. Nothing was loaded."
        raise StateError(message)
    with _translated(f"read {str(folder)!r}", StateError, "Nothing was loaded. Load the one before it."):
        dcp_load(wanted, checkpoint_id=target)
    averager.load_state_dict(wanted[_KEY])


def _wanted(metadata: Metadata, own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what is to be filled from a folder, and in words which tensors there and here are not the same."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    wanted: dict[str, Any] = {}
    tensors = dict(_leaves(own, (_KEY,)))
    problems = []
    paths: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    for key, saved in metadata.state_dict_metadata.items():
        path = tuple(paths.get(key, (key,)))
        if path[0] != _KEY:
            continue  # a model, an optimiser: others load those
        value = None
        if isinstance(saved, TensorStorageMetadata):
            mine = tensors.pop(path, None)
            if mine is None or mine.shape != saved.size:
                what = "unknown" if mine is None else f"not of shape {tuple(mine.shape)} as here"
                problems.append(f"{_called(path)} of shape {tuple(saved.size)} is {what}")
                continue
            # As wide as it was saved: load_state_dict() decides how it is kept.
            value = torch.empty_like(mine, dtype=saved.properties.dtype)
        _put(wanted, path, value)
    if _KEY not in wanted and not problems:
        return wanted, [f"it holds no {_KEY!r}"]
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


def _metadata(reader: Any, folder: Path) -> tuple[Metadata | None, str]:  # noqa: ANN401 - DCP's own type
    if not folder.is_dir():
        return None, "there is no such folder"
    try:
        return reader.read_metadata(), ""
    except Exception as error:  # noqa: BLE001 - a pickle of anything may raise anything
        return None, f"it is incomplete or damaged ({type(error).__name__}: {error})"


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what is no folder of averages.

    Raises:
        FileExistsError: It is something else, or holds more.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not folder.exists():
        return
    others = [folder.name]
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.name != ".metadata" and path.suffix != ".distcp")
        metadata, _ = _metadata(FileSystemReader(folder), folder)
        paths = {} if metadata is None else metadata.planner_data or {}
        others += sorted({str(path[0]) for path in paths.values()} - {_KEY})
    if others:
        message = f"{str(folder)!r} holds {others[0]!r}, which is no average and would be lost; give another folder"
        raise FileExistsError(message)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _recover(folder: Path) -> None:
    """Finish what was cut off between the two steps in which a folder takes another's place."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _on_first(act: Callable[[], None], purpose: str) -> None:
    """Let rank 0 do something that the others wait for.

    Raises:
        DistributedError: It could not, or a rank is gone.
    """
    problem = ""
    if _ranks() == 1 or dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            problem = f"rank 0 could not {purpose}: {error}"
    if problem := "".join(asked(problem, None, purpose)):
        raise DistributedError(problem)


@contextmanager
def _translated(purpose: str, kind: type[Exception], rest: str) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # One process is what one process is meant to be.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:  # which is no Exception: `except Exception` would let it pass
        reasons = [f"rank {rank}: {type(one).__name__}: {one}" for rank, (one, _) in error.failures.items()]
        message = f"could not {purpose}: {'; '.join(reasons[:_SHOWN])}. {rest}"
        raise kind(message) from error
    except RuntimeError as error:
        rank = dist.get_rank() if _ranks() > 1 else 0
        message = f"rank {rank} could not {purpose}; a rank may be gone: {error}. {rest}"
        raise (DistributedError if _ranks() > 1 else kind)(message) from error
