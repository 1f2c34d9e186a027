"""The seam for sharded engines: what differs between a plain module and one with sharded tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.tensors.entries import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polyak.tensors.entries import Entry, Model

__all__ = ["Adapter"]


class Adapter:
    """How the engine reaches the tensors of a model; this one is for plain modules and does nothing.

    The engine binds entries once and computes on what this process holds of them only, so that a sharded engine is a
    subclass of five short methods.
    """

    def entries(self, model: Model) -> list[Entry]:
        """Return the model's entries, each with the tensor that this process holds and how the whole is sharded."""
        return walk(model)

    def holds(self, entries: Sequence[Entry], live: Sequence[Tensor]) -> bool:  # noqa: ARG002 - a plain entry is what is held
        """Return whether the bound entries are held in these tensors still."""
        return True

    def before_swap(self, model: Model) -> None:
        """Prepare the model for values written into its tensors (FSDP2: reshard)."""

    def after_swap(self, model: Model) -> None:
        """Publish values that were written into the model's tensors (ZeRO: refresh the low-precision copies)."""

    def agree(self, entries: Sequence[Entry]) -> Callable[[bool], bool] | None:  # noqa: ARG002 - a plain model is one's own
        """Return a function that combines all ranks' answers into one, or None if each rank decides alone."""
        return None
