"""Several averages of one model, together and one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

__all__ = ["SIZES", "bank"]

SIZES = (2, 4, 8)
"""How many averages are measured."""
BANK = "polyak bank"


def bank(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of one update of several averages, in one bank and as averagers of their own."""
    return [row for count in SIZES for row in _one(subject, settings, count)]


def _one(subject: Subject, settings: Settings, count: int) -> list[Row]:
    device, reference = settings.place, f"{count} averagers"
    calls = {reference: _separate(subject.model, count), BANK: _together(subject.model, count)}
    for update in calls.values():
        for _ in range(3):
            update()
    samples = race(calls, settings.seconds / len(SIZES), device, f"bank of {count}, {subject.name}")
    more = {name: {"peak": peak(update, device), "group": "polyak"} for name, update in calls.items()}
    return rows_of("bank", subject, samples, reference, more=more, setting=f"{count} averages")


def _settings(count: int) -> dict[str, dict[str, Any]]:
    decays = (0.9 + 0.01 * number for number in range(count))
    return {f"average {decay:g}": {"strategy": "ema", "decay": decay, "nonfinite": "propagate"} for decay in decays}


def _separate(model: nn.Module, count: int) -> Callable[[], object]:
    averagers = [polyak.average(model, **options) for options in _settings(count).values()]

    def update() -> None:
        for averager in averagers:
            averager.update()

    return update


def _together(model: nn.Module, count: int) -> Callable[[], object]:
    return polyak.bank(model, _settings(count)).update
