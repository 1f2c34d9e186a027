"""Who updates the average: one optimiser by its own steps, several ones together once per batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.optim.attach import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from polyak.engine.averager import Averager
    from polyak.optim.attach import Attachment
    from polyak.tensors.entries import Model

__all__ = ["Steps"]


class Steps:
    """Updates an averager by the real steps of optimisers, whatever a loop accumulates and a scaler skips.

    Of several optimisers each has its own rhythm: they make one update per batch in which one of them stepped.

    Args:
        averager: The averager.
        optimizers: The trainer's optimisers, unwrapped.

    Raises:
        MismatchError: If an optimiser trains no tensor of the averager's model.
    """

    def __init__(self, averager: Averager, optimizers: Sequence[Optimizer]) -> None:
        self._averager = averager
        self._seen = [_Seen(averager) for _ in optimizers] if len(optimizers) > 1 else []
        self._attachments: list[Attachment] = []
        try:
            for optimizer, seen in zip(optimizers, self._seen, strict=False):
                self._attachments.append(attach(optimizer, seen))
            if len(optimizers) == 1:
                self._attachments.append(attach(optimizers[0], averager))
        except BaseException:
            self.remove()
            raise

    def batch_ends(self) -> None:
        """Update by the steps of several optimisers, where one of them was made."""
        moved = [seen for seen in self._seen if seen.moved]
        if moved:
            self._averager.update(lr=moved[0].lr)
        for seen in moved:
            seen.moved = False

    def remove(self) -> None:
        """Take the hooks off the optimisers."""
        for attachment in self._attachments:
            attachment.remove()
        self._attachments.clear()


class _Seen:
    """Notes the steps of one optimiser: attached in the place of the averager."""

    def __init__(self, averager: Averager) -> None:
        self._averager = averager
        self.moved = False
        self.lr: float | None = None

    @property
    def model(self) -> Model | None:
        """The model of the averager."""
        return getattr(self._averager, "model", None)

    @property
    def is_applied(self) -> bool:
        """Whether the model holds the average, and steps are refused."""
        return self._averager.is_applied

    def update(self, *, lr: float | None = None) -> None:
        """Note a real step."""
        self.moved, self.lr = True, lr
