"""What the stand-ins have in common: tensors of theirs that follow others by the engine, at rates of their own."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyak.config.factory import average

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from polyak.engine.averager import Averager

__all__ = ["Following", "followed"]

_PLACE = Tensor.data_ptr, Tensor.stride, attrgetter("dtype"), attrgetter("shape")


def followed(model: nn.Module, module: nn.Module, **options: Any) -> Averager:
    """Return the averager of a model whose average is a module; each update is given its rate."""
    return average(model, "ema", into=module, **options)


class Following:
    """Lists of tensors that follow others, whichever tensors are in either at each update.

    The tensors themselves are not kept alive, only the memory of those that were followed last.
    """

    def __init__(self) -> None:
        self._averager: Averager | None = None
        self._live: list[Tensor] = []
        self._places: list[list[Any]] = []

    def update(self, averages: Sequence[Tensor], live: Sequence[Tensor], rate: float) -> None:
        """Move each average towards its live tensor: ``average += rate * (live - average)``; integers are copied.

        Args:
            averages: The averages, written in place.
            live: What each follows.
            rate: From 0 to 1.

        Raises:
            MismatchError: If there are more of one than of the other, or shapes differ.
        """
        if not averages:
            return
        # By their memory: some classes make new tensors of it for each update.
        places = [[*map(part, tensors)] for tensors in (averages, live) for part in _PLACE]
        if self._averager is None or places != self._places:
            self._live, self._places = [tensor.detach() for tensor in live], places
            self._averager = average(self._live, "ema", into=[*averages])
        self._averager.update(self._live, rate=rate)

    def __deepcopy__(self, memo: dict[int, Any]) -> Following:
        return Following()  # a copy's tensors are others

    def __reduce__(self) -> tuple[type[Following], tuple[()]]:
        return Following, ()
