"""A step of AdamW and the update behind it, one after the other and in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import polyak
from polyak.bench.cases.common import rows_of
from polyak.bench.memory import peak
from polyak.bench.race import race

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["APART", "TOGETHER", "adamw"]

APART, TOGETHER = "AdamW(fused=True), then update()", "polyak.optim.AdamW"
ALONE = "AdamW(fused=True) alone"
_SETTINGS: dict[str, Any] = {"lr": 1e-5, "fused": True}


def adamw(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of one step of an optimiser with one update of an average, apart and together."""
    model, device = subject.model, settings.place
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    calls = {APART: _apart(model), TOGETHER: _together(model), ALONE: _alone(model)}
    try:
        for step in calls.values():
            for _ in range(3):
                step()
        samples = race(calls, settings.seconds, device, f"AdamW, {subject.name}")
        more: dict[str, dict[str, Any]] = {name: {"peak": peak(step, device)} for name, step in calls.items()}
    finally:
        model.zero_grad()
    more[APART]["group"] = "polyak"
    return rows_of("adamw", subject, samples, APART, more=more)


def _averager(model: nn.Module) -> polyak.Averager:
    return polyak.average(model, "ema", decay=0.999)


def _apart(model: nn.Module) -> Callable[[], object]:
    optimizer, averager = torch.optim.AdamW(model.parameters(), **_SETTINGS), _averager(model)

    def step() -> None:
        optimizer.step()
        averager.update()

    return step


def _together(model: nn.Module) -> Callable[[], object]:
    step: Callable[[], object] = polyak.optim.AdamW(model.parameters(), averager=_averager(model), **_SETTINGS).step
    return step


def _alone(model: nn.Module) -> Callable[[], object]:
    step: Callable[[], object] = torch.optim.AdamW(model.parameters(), **_SETTINGS).step
    return step
