"""The average in the module while it is validated, and out of it while its own weights are saved."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak.errors import AppliedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from polyak.engine.averager import Averager

__all__ = ["Evaluation"]


class Evaluation:
    """Puts an average into its model between two events.

    Args:
        averager: The averager.
    """

    def __init__(self, averager: Averager) -> None:
        self._averager = averager
        self._swap: AbstractContextManager[None] | None = None

    def enter(self) -> None:
        """Put the average into the model. Idempotent."""
        if self._swap is None:
            swap = self._averager.applied()
            swap.__enter__()
            self._swap = swap

    def leave(self) -> None:
        """Restore the model's own weights. Idempotent."""
        if self._swap is not None:
            swap, self._swap = self._swap, None
            swap.__exit__(None, None, None)

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Return a context in which the model holds its own weights.

        Raises:
            AppliedError: If somebody else has put the average into the model.
        """
        was_in = self._swap is not None
        self.leave()
        try:
            if self._averager.is_applied:
                message = (
                    "saving a checkpoint inside applied() would save the average as the raw weights; leave it first"
                )
                raise AppliedError(message)
            yield
        finally:
            if was_in:
                self.enter()
