"""The tensors of a combination of snapshots, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polyak.errors.calls import warn_user
from polyak.io.progress import track
from polyak.io.tensor_file import Scratch
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.posthoc.snapshot import Snapshot

__all__ = ["combined"]

_PIECE = 1 << 16  # values that are added at a time


def combined(used: Sequence[tuple[Snapshot, float]], last: Snapshot) -> dict[str, Tensor]:
    """Return the state dict of a combination; what is not averaged comes from the last snapshot.

    Warns:
        PolyakWarning: If an averaged tensor holds NaN or infinities.
    """
    layout = last.layout
    averaged = {*layout.averaged}
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    reading, summing = Scratch(), Scratch()
    for name, dtype in track(layout.dtypes.items(), "combining snapshots"):
        # The coefficients of what is the same in all of them add up to 1.
        if name not in averaged or (last.constant(name) and len({one.constant(name) for one, _ in used}) == 1):
            tensors[name] = last.read_weights(name).to(getattr(torch, dtype))
            continue
        short: torch.dtype = getattr(torch, dtype)
        wide = torch.complex128 if short.is_complex else torch.float64
        total = summing.tensor(last.file.shape(f"weights/{name}")[: -1 if wide.is_complex else None], wide).zero_()
        for snapshot, x in used:
            weights = snapshot.read_weights(name, reading)
            # A sum of two dtypes widens the shorter one first: piece by piece, not another whole tensor.
            for part, more in zip(
                torch.split(total.view(-1), _PIECE), torch.split(weights.view(-1), _PIECE), strict=True
            ):
                part.add_(more, alpha=x)
        tensors[name] = total.to(short, copy=True)
        if not FiniteCheck([tensors[name]])():
            broken.append(name)
    if broken:
        _warn_of(broken, used)
    return {key: tensors[name] for key, name in layout.keys.items()}


def _warn_of(broken: Sequence[str], used: Sequence[tuple[Snapshot, float]]) -> None:
    """Warn of tensors that hold NaN or infinities, and say where these come from."""
    name = broken[0]
    sources = [snapshot for snapshot, _ in used if not FiniteCheck([snapshot.read_weights(name)])()]
    if sources:
        dtype = str(sources[0].file.dtype(f"weights/{name}")).removeprefix("torch.")
        cause = f"so does the snapshot {sources[0].path.name!r}, where it is {dtype}"
    else:
        cause = "the model's dtype is too short for its values"
    message = (
        f"the synthesised {name!r} holds NaN or infinities ({len(broken)} tensors do): {cause}. profile_error says "
        "nothing about these values; want an average at another step, or record in a longer dtype"
    )
    warn_user(message)
