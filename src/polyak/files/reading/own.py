"""Files that polyak wrote itself: an averager's state, and snapshots of a recorded run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import StateError
from polyak.errors.formatting import shown
from polyak.files.reading.file import read_file
from polyak.files.reading.inside import inside
from polyak.files.reading.raw import Stored

if TYPE_CHECKING:
    from pathlib import Path

    from polyak.files.reading.found import Found

__all__ = ["of_averager", "of_snapshot"]

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128, torch.float16: torch.complex32}


def of_averager(found: Found) -> Found:
    """Return the average in the state of an averager, without what only a resume needs.

    Raises:
        ValueError: If its metadata are damaged.
    """
    about = _table(found.texts["polyak"])
    averages = {name: stored for name, stored in found.tensors.items() if name.startswith("average/")}
    pairs = {str(name) for name in about.get("complex") or ()}
    found.tensors = {
        name.removeprefix("average/"): _complex(name, stored) if name in pairs else stored
        for name, stored in averages.items()
    }
    found.notes.append("it is polyak's own: the average of an averager")
    return found


def of_snapshot(found: Found, path: Path) -> Found:
    """Return the weights of a snapshot by the keys of the model's state dict.

    Raises:
        StateError: If the file with its frozen tensors is missing.
        ValueError: If its metadata are damaged.
    """
    about = _table(found.texts["polyak_snapshot"])
    tensors = {**found.tensors}
    if constants := about.get("constants"):
        tensors = {**read_file(inside(path.parent, constants), None).tensors, **tensors}
    layout = about.get("layout")
    keys = layout.get("keys") if isinstance(layout, dict) else None
    if not isinstance(keys, dict) or any(f"weights/{name}" not in tensors for name in keys.values()):
        message = f"{str(path)!r} is a damaged snapshot: it does not say what its tensors belong to"
        raise StateError(message)
    pairs = {str(name) for name in about.get("complex") or ()}
    found.tensors = {
        key: _complex(name, tensors[f"weights/{name}"]) if name in pairs else tensors[f"weights/{name}"]
        for key, name in keys.items()
    }
    found.notes.append(f"it is polyak's own: a snapshot of the average {shown(about.get('average'))}")
    return found


def _table(text: str) -> Mapping[str, Any]:
    table = json.loads(text)
    if not isinstance(table, Mapping):
        message = "its metadata are no table"
        raise ValueError(message)  # noqa: TRY004 - a damaged file
    return table


def _complex(name: str, stored: Stored) -> Stored:
    """Return a tensor of pairs as a complex one."""
    if stored.shape[-1:] != (2,) or stored.dtype not in _COMPLEX:
        message = f"the tensor {shown(name)} holds no complex numbers"
        raise ValueError(message)
    shape = stored.shape[:-1]
    (part,) = stored.parts
    return Stored(_COMPLEX[stored.dtype], shape, (part._replace(end=math.prod(shape)),))
