"""The moment of an update, as a strategy sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import override

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Clock", "Clocks", "WatchedClock"]


@dataclass(frozen=True, slots=True)
class Clock:
    """The moment of one averaged update: all that a rate may depend on.

    Attributes:
        n: The 1-based count of averaged updates, this one included.
        step: The optimiser step, as given to ``update(step=...)``; without it, the count of calls.
        stride: Optimiser steps since the previous averaged update (``every``, unless ``step`` jumped).
        lr: The learning rate given to ``update(lr=...)``, or None.
        mass: The sum of ``strategy.weight(clock)`` over the earlier updates; 0 at the first.
        elapsed: Optimiser steps averaged so far, this stride included; ``n * stride`` where it is not given.
        counted: Whether ``step`` was counted by the averager and not given by the caller.

    Often confused with: ``n`` counts averaged updates and ``step`` optimiser steps. They differ with
    ``start``, ``every``, and after updates that were skipped because of a NaN.

    Examples:
        >>> Clock(n=3, step=30, stride=10).elapsed
        30
    """

    n: int
    step: int
    stride: int = 1
    lr: float | None = None
    mass: float = 0.0
    elapsed: int = 0
    counted: bool = True

    def __post_init__(self) -> None:
        if not self.elapsed:
            object.__setattr__(self, "elapsed", self.n * self.stride)


class WatchedClock(Clock):
    """A clock that notes whether its learning rate is read."""

    __slots__ = ("is_read",)
    is_read: bool

    @classmethod
    def of(cls, clock: Clock) -> Self:
        """Return a clock of this class for the same moment."""
        watched = cls(clock.n, clock.step, clock.stride, clock.lr, clock.mass, clock.elapsed, clock.counted)
        object.__setattr__(watched, "is_read", False)
        return watched

    @override
    def __repr__(self) -> str:
        return repr(Clock(*(object.__getattribute__(self, name) for name in Clock.__slots__)))

    @override
    def __getattribute__(self, name: str) -> Any:
        if name == "lr":
            object.__setattr__(self, "is_read", True)
        return object.__getattribute__(self, name)


class Clocks(NamedTuple):
    """The moments of updates 1..n as arrays of shape (n,), under the names of a clock's attributes.

    A rate that is arithmetic only takes them in the place of a clock and gives all rates at once.
    """

    n: NDArray[np.float64]
    step: NDArray[np.float64]
    stride: float
    lr: float | None
    mass: NDArray[np.float64]
    elapsed: NDArray[np.float64]
    counted: bool

    def those(self, chosen: Any, kind: NDArray[np.int64]) -> Self:  # noqa: ANN401 - indices or a slice
        """Return some of them; ``kind`` holds their stride and whether they are counted."""
        return self._replace(
            n=self.n[chosen], step=self.step[chosen], stride=float(kind[0]), mass=self.mass[chosen],
            elapsed=self.elapsed[chosen], counted=bool(kind[1]),
        )  # fmt: skip
