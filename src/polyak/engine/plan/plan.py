"""The cached pairing one update runs on: bound once, checked cheaply, rebuilt when the model changed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from polyak.engine.plan.groups import Lane
from polyak.engine.plan.moves import Moves
from polyak.engine.plan.offload import Offload, crosses
from polyak.errors import MismatchError, ModelError
from polyak.tensors.changes import ChangeDetector
from polyak.tensors.entries import Entry, Model, address
from polyak.tensors.located import plain
from polyak.tensors.modes import Untracked
from polyak.tensors.writing import read_only

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.engine.options import Options
    from polyak.tensors.adapter import Adapter
    from polyak.tensors.storage import Stored

__all__ = ["Plan", "refuse_average"]


class Plan:
    """Which stored tensor is moved by which live tensor.

    Built from a walk; after that an unchanged model costs a few passes in C over its dictionaries and tensors.

    Attributes:
        model: The model, without wrappers.
        entries: Its entries, those that are skipped left out.
        stored: The stored tensor of each entry.
        live: The live tensor of each entry, or this rank's part of it.
        adapter: How to reach them.
        watch: Notices when the model changes.
        offload: Moves them beside the training, where they live on another device than the model; else None.
    """

    def __init__(
        self, model: Model, stored: Sequence[Stored], entries: Sequence[Entry], options: Options, adapter: Adapter
    ) -> None:
        self.model = model
        self.entries = list(entries)
        self.stored = list(stored)
        self.live = [entry.tensor for entry in entries]
        self.adapter = adapter
        self._kernel, self._nearest = options.kernel, options.rounding == "nearest"
        self._agree = adapter.agree(entries)
        self.watch = ChangeDetector(model, self.live, [tensor for s in self.stored for tensor in s.tensors])
        pairs = zip(self.stored, self.live, strict=True)
        self.offload = Offload(self.lane) if any(crosses(s.average, t) for s, t in pairs) else None
        if self.offload is None:
            self.moves  # noqa: B018 - compiled now, and not in the first update
        self._written: int | None = None
        self._memory = [address(entry.tensor) for entry in entries]
        self._fresh = [(s, t) for s, t in zip(self.stored, self.live, strict=True) if s.fresh]

    @property
    def lane(self) -> Lane:
        """What an update needs to know of it."""
        return Lane(self.stored, self.live, self._kernel, self._nearest, self.watch, self._agree)

    @cached_property
    def moves(self) -> Moves:
        """Makes an update while the caller waits."""
        return Moves(self.lane)

    @cached_property
    def averaged(self) -> frozenset[int]:
        """The ids of the live tensors that are averaged."""
        return frozenset(id(t) for s, t in zip(self.stored, self.live, strict=True) if s.policy == "average")

    def is_current(self, model: Model) -> bool:
        """Return whether the model still holds exactly the tensors this plan was built from."""
        return model is self.model and self.watch.unchanged() and self.adapter.holds(self.entries, self.live)

    def refresh(self) -> None:
        """Let each average that no update has moved yet, of a buffer that the model filled since, be the live value."""
        if not self._fresh:
            return
        with Untracked():
            for stored, live in self._fresh:
                for tensor in (stored.average, *stored.slots.values()):
                    tensor.copy_(live)

    def settle(self) -> None:
        """Go on from the averages as they are; idempotent."""
        for stored, _ in self._fresh:
            stored.fresh = False
        self._fresh = []

    def refuse_read_only(self) -> None:
        """Refuse to write into a model whose memory is read-only; looked at once for each memory it has.

        Raises:
            ModelError: If it is.
        """
        if self._written == self.watch.epoch:
            return
        if found := {*map(id, read_only(self.live))}:
            names = [s.name for s, live in zip(self.stored, self.live, strict=True) if id(live) in found]
            message = (
                f"{len(names)} of the model's tensors (the first is {names[0]}) lie in read-only memory, as that of "
                "np.load(..., mmap_mode='r'). Copy them first: parameter.data = parameter.data.clone()."
            )
            raise ModelError(message)
        self._written = self.watch.epoch

    def bound(self) -> dict[int, int]:
        """Return the address of each stored tensor's live one when it was bound, by the stored one's id."""
        return {id(s): memory for s, memory in zip(self.stored, self._memory, strict=True)}


def refuse_average(entries: Sequence[Entry], stored: Sequence[Stored], *, handed_out: bool) -> None:
    """Refuse an average as the model: it would be averaged with itself, and never move.

    Args:
        entries: The entries of the model.
        stored: What the averager stores.
        handed_out: Whether the model is known to compute with the average.

    Raises:
        MismatchError: If it is, or if a tensor of the model shares memory with the average.
    """
    averages = {t.untyped_storage().data_ptr() for t in plain([t for s in stored for t in s.tensors])} - {0}
    names = [e.name for e in entries if plain([e.tensor]) and e.tensor.untyped_storage().data_ptr() in averages]
    if names or handed_out:
        where = f" ({names[0]} shares its memory)" if names else ""
        message = f"the model is the average itself{where}; give update() the model that is trained"
        raise MismatchError(message)
