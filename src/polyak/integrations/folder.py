"""An average beside the files that a framework writes into the folder of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyak.checkpoints import load, save
from polyak.distributed import folders
from polyak.errors import StateError
from polyak.integrations.weights import is_sharded
from polyak.io.atomic import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from polyak.engine.averager import Averager

__all__ = ["holds", "load_average", "load_weights", "save_average", "save_weights"]


def save_average(averager: Averager, place: Path, *, writes: bool) -> None:
    """Write an average as ``<place>.pt``, or as the folder ``<place>`` of all ranks where it is sharded.

    Args:
        averager: The averager. All ranks call this where it is sharded.
        place: The name without its ending; its folder is made.
        writes: Whether this process writes what all have.
    """
    if is_sharded(averager):
        place.parent.mkdir(parents=True, exist_ok=True)
        folders.save(averager, place)
    elif writes:
        place.parent.mkdir(parents=True, exist_ok=True)
        save(averager, _file(place))


def load_average(averager: Averager, place: Path) -> None:
    """Load what ``save_average`` wrote, by this or another number of ranks.

    Raises:
        StateError: If it is damaged, or of another model or strategy. Nothing was loaded then.
    """
    if place.is_dir():
        folders.load(averager, place)
    else:
        load(averager, _file(place))


def holds(place: Path) -> bool:
    """Return whether an average was written there."""
    return place.is_dir() or _file(place).exists()


def save_weights(weights: dict[str, Tensor], place: Path) -> None:
    """Write tensors as ``<place>.pt``, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_file(place), lambda scratch: torch.save(weights, scratch))


def load_weights(place: Path) -> dict[str, Tensor]:
    """Return what ``save_weights`` wrote.

    Raises:
        StateError: If the file is damaged.
    """
    file = _file(place)
    try:
        weights: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        message = f"{str(file)!r} is damaged or incomplete: {error}. Resume from an earlier checkpoint."
        raise StateError(message) from error
    return dict(weights)


def _file(place: Path) -> Path:
    return place.with_name(f"{place.name}.pt")
