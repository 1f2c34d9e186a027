"""What ``torch.distributed.checkpoint`` raises, as our own errors: its exception is not an ``Exception``."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak.ranks.unresponsive import answered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["metadata", "raised_as"]

_SHOWN = 6


@contextmanager
def raised_as(purpose: str, kind: type[Exception], rest: str, ranks: Sequence[int] | None) -> Iterator[None]:
    """Raise what DCP raises as an error of another class.

    Args:
        purpose: What fails, as a verb.
        kind: The class of the error.
        rest: What that means, and what to do.
        ranks: The participants. Defaults to all.

    Raises:
        DistributedError: If a rank does not answer.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with answered(purpose, rest, ranks=ranks), warnings.catch_warnings():
            # One process without a group is no mistake here; in the words of torch 2.6 and of later ones.
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            yield
    except CheckpointException as error:  # which is no Exception: `except Exception` would let it pass
        reasons = [f"rank {rank}: {type(one).__name__}: {one}" for rank, (one, _) in error.failures.items()]
        message = f"could not {purpose}: {'; '.join(reasons[:_SHOWN])}. {rest}"
        raise kind(message) from error


def metadata(folder: Path) -> tuple[Metadata | None, str]:
    """Return the metadata of a folder, or the reason why it cannot be read."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not folder.is_dir():
        return None, "it is a file, not a folder" if folder.exists() else "there is no such folder"
    if not (folder / ".metadata").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/.metadata"))
        return None, f"it is not a finished checkpoint{f' (in it there are {inside})' if inside else ''}"
    try:
        return FileSystemReader(folder).read_metadata(), ""
    except Exception as error:  # noqa: BLE001 - a pickle of anything may raise anything
        return None, f"it is incomplete or damaged ({type(error).__name__}: {error})"
