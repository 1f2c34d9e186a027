"""The sum of a strategy's own shares times the weights, in float64: what every average is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import polyak

from .architectures import distinct

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


class Exact:
    """``sum(share * weights)`` in float64, for each distinct floating tensor of a model.

    The shares are those that the strategy states for its rates, whatever it keeps next to the average. Buffers that the
    strategy copies are those of the last step.

    Args:
        model: Its weights are taken in as they are, then after each step.
        strategy: Gives the rates and the shares.
        lrs: The learning rate of each step to come.
    """

    def __init__(self, model: nn.Module, strategy: polyak.Strategy, lrs: Sequence[float]) -> None:
        updates, start = strategy.shares(np.array(_rates(strategy, lrs)))
        self._shares = iter(np.asarray(updates).tolist())
        self.live = {name: tensor for name, tensor in distinct(model).items() if tensor.is_floating_point()}
        self.averages = {name: start * tensor.detach().double() for name, tensor in self.live.items()}
        parameters = {id(parameter) for parameter in model.parameters()}
        copies = strategy.engine().get("buffers") == "copy"
        self._copied = {name for name, tensor in self.live.items() if copies and id(tensor) not in parameters}

    def update(self) -> None:
        """Add the weights of the next step with their share."""
        share = next(self._shares)
        for name, average in self.averages.items():
            live = self.live[name].detach().double()
            if name in self._copied:
                average.copy_(live)
            else:
                average.add_(live, alpha=share)


def _rates(strategy: polyak.Strategy, lrs: Sequence[float]) -> list[float]:
    rates, mass = [], 0.0
    first = strategy.engine().get("origin") == "first"
    for step, lr in enumerate(lrs, start=1):
        clock = polyak.Clock(n=step, step=step, lr=lr, mass=mass, elapsed=step, counted=False)
        rates.append(1.0 if first and step == 1 else strategy.rate(clock))
        mass += strategy.weight(clock)
    return rates


def furthest(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference between floating tensors, relative to the tensor's largest value, and its name."""
    return max(
        (float((got[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)), name)
        for name, tensor in expected.items()
        if tensor.is_floating_point()
    )
