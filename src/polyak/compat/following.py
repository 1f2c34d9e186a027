"""What the stand-ins have in common: tensors of theirs that follow others by the engine, at rates of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from polyak.config.factory import average

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from polyak.engine.averager import Averager

__all__ = ["Following", "followed"]


def followed(model: nn.Module, module: nn.Module, **options: Any) -> Averager:
    """Return the averager of a model whose average is a module; each update is given its rate."""
    return average(model, "ema", into=module, **options)


class Following:
    """Lists of tensors that follow others, whichever tensors are in either at each update.

    The tensors themselves are not kept alive, only the memory of those that were followed last.
    """

    def __init__(self) -> None:
        self._averager: Averager | None = None
        self._averages: list[Tensor] = []
        self._live: list[Tensor] = []
        self._places: list[tuple[int, Any]] = []

    def update(
        self,
        averages: Sequence[Tensor],
        live: Sequence[Tensor],
        rate: float,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
    ) -> None:
        """Move each average towards its live tensor: ``average += rate * (live - average)``; integers are copied.

        Args:
            averages: The averages, written in place.
            live: What each follows.
            rate: From 0 to 1.
            rounding: How averages in short dtypes are rounded.

        Raises:
            MismatchError: If there are more of one than of the other, or shapes differ.
        """
        if not averages:
            return
        places = [(tensor.data_ptr(), tensor.dtype) for tensor in live]
        same = len(averages) == len(self._averages) and all(map(_is, averages, self._averages))
        if self._averager is None or not same or places != self._places:
            self._live, self._places, self._averages = [tensor.detach() for tensor in live], places, [*averages]
            self._averager = average(self._live, "ema", into=self._averages, rounding=rounding)
        self._averager.update(self._live, rate=rate)

    def __deepcopy__(self, memo: dict[int, Any]) -> Following:
        return Following()  # a copy's tensors are others

    def __reduce__(self) -> tuple[type[Following], tuple[()]]:
        return Following, ()


def _is(first: object, second: object) -> bool:
    return first is second
