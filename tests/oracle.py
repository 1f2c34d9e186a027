"""The reference that every average is held against: rates by hand, then the sum of shares times weights in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

import polyak
from models import tensors_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor, nn

# Settings beside the defaults with which a strategy is tried; those of plugins are found by themselves.
SETTINGS: dict[str, list[dict[str, object]]] = {
    "ema": [{"decay": 0.9}, {"decay": 0.0}, {"decay": 0.5, "origin": "first"}],
    "ema_debiased": [{"decay": 0.9}],
    "ema_v1": [{"decay": 0.8}],
    "ema_v2": [{"decay": 0.8}],
    "ema_v3": [
        {"decay": 0.9, "use_warmup": True, "min_decay": 0.1},
        {"decay": 0.8, "update_after_step": 2, "foreach": False},
    ],
    "swa": [{}],
    "ema_halflife": [{"halflife": 3.0}, {"halflife": 0.5, "unit": "fraction", "total_steps": 12, "origin": "first"}],
    "ema_tf": [{}, {"decay": 0.4}, {"decay": 0.0}, {"follow": 2}],
    "polynomial": [{}, {"eta": 0.5}, {"eta": 0.0}],
    "power": [{}, {"gamma": 0.5}],
    "tail": [{}, {"fraction": 0.3, "total_steps": 10}],
    "lawa": [{}, {"window": 3}],
    "dema": [{"decay": 0.6}, {"decay": 0.9, "origin": "first"}],
    "block_mean": [{"length": 5}],
    "byol": [{"decay": 0.9, "steps": 20}],
}


def strategies_to_try() -> list[tuple[str, dict[str, object]]]:
    """Return every strategy that is installed, each with settings that make sense in few steps."""
    return [(name, settings) for name in polyak.strategies() for settings in SETTINGS.get(name, [{}])]


def rates_of(
    strategy: polyak.Strategy, due: Sequence[int], *, every: int = 1, origin: str, lrs: Sequence[float], counted: bool
) -> list[float]:
    """Return the rates of updates at the steps ``due``, from nothing but the strategy's own formula."""
    rates: list[float] = []
    mass, elapsed = 0.0, 0
    strides = [every, *(after - before for before, after in pairwise(due))][: len(due)]
    for n, (step, stride, lr) in enumerate(zip(due, strides, lrs, strict=True), start=1):
        elapsed += stride
        clock = polyak.Clock(n=n, step=step, stride=stride, lr=lr, mass=mass, elapsed=elapsed, counted=counted)
        rates.append(1.0 if n == 1 and origin == "first" else strategy.rate(clock))
        mass += strategy.weight(clock)
    return rates


def shares_of(strategy: polyak.Strategy, rates: Sequence[float]) -> tuple[float, list[float]]:
    """Return the share of the start and of each update: the strategy's moves, made on one-hot vectors."""
    one_hot = torch.eye(len(rates) + 1, dtype=torch.float64)
    tensors = dict.fromkeys(("average", *strategy.slots()), one_hot[0])
    for n, rate in enumerate(rates, start=1):
        tensors["weights"] = one_hot[n]
        for target, source, by in strategy.moves(n, rate):
            tensors[target] = tensors[target] * (1.0 - by) + tensors[source] * by
    start, *shares = tensors["average"].tolist()
    return start, shares


class Reference:
    """Remembers a model's weights in float64 and sums them up with given rates."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start = _exact(model)
        self.seen: list[dict[str, Tensor]] = []

    def see(self) -> None:
        self.seen.append(_exact(self.model))

    def mean(self, name: str, left: float, shares: Sequence[float]) -> Tensor:
        """Return what an averaged tensor must be, of which the start has the share ``left``."""
        total = left * self.start[name]
        for share, weights in zip(shares, self.seen, strict=True):
            total = total + share * weights[name]
        return total

    def latest(self, name: str) -> Tensor:
        """Return what a copied tensor must be."""
        return (self.seen[-1] if self.seen else self.start)[name]


def _exact(model: nn.Module) -> dict[str, Tensor]:
    def widen(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(torch.complex128, copy=True)
        return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()

    return {name: widen(tensor) for name, tensor in tensors_of(model).items()}


_COPIED = ("count", "flags", "mask", "num_batches_tracked", "_u", "_v")


def is_copied(name: str, names: Collection[str]) -> bool:
    """Return whether a tensor of the zoo is copied, not averaged: integers, masks and power iterations."""
    module, _, key = name.rpartition(".")
    # The old spectral norm has weight_u and weight_v; the old weight norm has weight_v, a parameter, and weight_g.
    return key in _COPIED or (key in {"weight_u", "weight_v"} and f"{module}.weight_u" in names)
