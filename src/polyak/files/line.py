"""``polyak.files.path``: the loss along the straight line between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.files.inputs import check_enough, opened
from polyak.files.kinds import is_lora
from polyak.files.mixed import metric, mixed
from polyak.files.plan import planned
from polyak.strategy.numbers import given_integer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from torch import Tensor

__all__ = ["Line", "path"]


@dataclass(frozen=True)
class Line:
    """What a function says of the weights between two checkpoints.

    Attributes:
        positions: Where each point is: 0 is the first checkpoint, 1 the second.
        values: What the function said there.
        mode: Whether small values are good.
    """

    positions: tuple[float, ...]
    values: tuple[float, ...]
    mode: Literal["min", "max"]

    @property
    def barrier(self) -> float:
        """How much worse the worst point is than the straight line between the values at both ends, 0 at least."""
        first, last = self.values[0], self.values[-1]
        sign = 1.0 if self.mode == "min" else -1.0
        pairs = zip(self.positions, self.values, strict=True)
        return max(0.0, *(sign * (value - (1 - t) * first - t * last) for t, value in pairs))

    @property
    def best(self) -> float:
        """The position of the best point."""
        return self.positions[self.values.index((min if self.mode == "min" else max)(self.values))]

    def plot(self, ax: Axes | None = None, *, label: str = "loss") -> Axes:
        """Draw the values along the line, and the straight line between both ends.

        Args:
            ax: Where to draw. Defaults to a new figure.
            label: What the values are.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        from polyak.plot import between

        return between(self.positions, self.values, ax, label=label)


def path(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    evaluate: Callable[[dict[str, Tensor]], float],
    points: int = 11,
    *,
    mode: Literal["min", "max"] = "min",
    key: str | None = None,
) -> Line:
    """Evaluate the weights ``(1 - t) a + t b`` for t from 0 to 1: linear mode connectivity.

    Averaging can help only where there is no barrier in between. Batch norm statistics are averaged like weights; a
    function that recalibrates them shows the line of the weights alone.

    Source: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), arXiv:1912.05671.

    Args:
        a: The first checkpoint.
        b: The second one.
        evaluate: Returns a number for a state dict, such as the loss on a validation set.
        points: How many points, both ends included.
        mode: Whether small numbers are good ("min") or large ones ("max").
        key: The path of keys to the weights in a dictionary. Defaults to the one that is usual.

    Raises:
        ConfigError: If an option is wrong, or ``evaluate`` returns no finite number.
        MismatchError: If names or shapes differ.
        StateError: If a file cannot be read.

    Often confused with: a curve of low loss between two checkpoints, which may exist where the straight line is bad.

    Examples:
        >>> import tempfile, torch
        >>> from polyak import files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number in (-1.0, 1.0):
        ...         torch.save({"w": torch.tensor([number])}, f"{folder}/{number}.pt")
        ...     line = files.path(f"{folder}/-1.0.pt", f"{folder}/1.0.pt", lambda s: s["w"].item() ** 2, points=3)
        >>> line.values, line.barrier, line.best
        ((1.0, 0.0, 1.0), 0.0, 0.5)
    """
    count = given_integer("points", points, 2, 10_000)
    if not callable(evaluate) or mode not in {"min", "max"}:
        message = f"path(a, b, evaluate, mode='min' or 'max'): got {shown(evaluate)} and {shown(mode)}"
        raise ConfigError(message)
    with opened([a, b], key) as found:
        check_enough(found)
        if any(is_lora(one.tensors) for one in found):
            message = "the files hold factors of an adapter (LoRA), between which no straight line of weights leads"
            raise ConfigError(message)
        entries, _ = planned(found, match="same", integers="last", dtype=None)
        positions = [number / (count - 1) for number in range(count)]
        values = []
        for t in positions:
            shares = {index: share for index, share in ((0, 1.0 - t), (1, t)) if share}
            values.append(metric(evaluate, mixed(entries, shares)))
        return Line(tuple(positions), tuple(values), mode)
