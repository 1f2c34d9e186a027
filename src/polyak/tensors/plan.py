"""The cached pairing one update runs on: bound once, checked cheaply, rebuilt when the model changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.tensors.entries import Entry, Model, address
from polyak.tensors.groups import Lane
from polyak.tensors.mover import Mover
from polyak.tensors.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.tensors.adapter import Adapter
    from polyak.tensors.kernels import KernelName
    from polyak.tensors.storage import Stored

__all__ = ["Plan"]


class Plan:
    """Which stored tensor is moved by which live tensor.

    Built from a walk; after that an unchanged model costs a few passes in C over its dictionaries and tensors.

    Attributes:
        model: The model, without wrappers.
        entries: Its entries, those that are skipped left out.
        stored: The stored tensor of each entry.
        live: The live tensor of each entry, as the adapter gives it.
        lane: What an update needs of them.
        mover: Moves them.
    """

    def __init__(
        self, model: Model, stored: Sequence[Stored], entries: Sequence[Entry], kernel: KernelName, adapter: Adapter
    ) -> None:
        self.model = model
        self.entries = list(entries)
        self.stored = list(stored)
        self.live = [adapter.local(entry.tensor) for entry in entries]
        self.lane = Lane(self.stored, self.live, kernel, Watch(model, self.live))
        self.mover = Mover([self.lane])
        self._memory = [address(entry.tensor) for entry in entries]

    def is_current(self, model: Model) -> bool:
        """Return whether the model still holds exactly the tensors this plan was built from."""
        return model is self.model and self.lane.watch.unchanged()

    def bound(self) -> dict[int, int]:
        """Return the address of each stored tensor's live one when it was bound, by the stored one's id."""
        return {id(s): memory for s, memory in zip(self.stored, self._memory, strict=True)}
