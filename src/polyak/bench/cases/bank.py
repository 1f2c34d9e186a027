"""Several averages of one model, together and one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polyak
from polyak.bench.cases.common import rows_of
from polyak.bench.memory import peak
from polyak.bench.race import race

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["KERNELS", "SIZES", "bank"]

SIZES = (2, 4, 8)
"""How many averages are measured."""
KERNELS = ("auto", "foreach")
"""Which kernels, where none is asked for."""
BANK = "polyak bank"


def bank(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of one update of several averages, in one bank and as averagers of their own."""
    kernels = settings.kernels or KERNELS
    return [row for kernel in kernels for count in SIZES for row in _one(subject, settings, kernel, count)]


def _one(subject: Subject, settings: Settings, kernel: str, count: int) -> list[Row]:
    device, reference = settings.place, f"{count} averagers"
    wanted = _wanted(kernel, count)
    calls = {reference: _separate(subject.model, wanted), BANK: polyak.bank(subject.model, wanted).update}
    for update in calls.values():
        for _ in range(3):
            update()
    samples = race(calls, settings.seconds / len(SIZES), device, f"bank of {count}, {kernel}, {subject.name}")
    more = {name: {"peak": peak(update, device), "group": "polyak"} for name, update in calls.items()}
    return rows_of("bank", subject, samples, reference, more=more, setting=f"{count} averages, {kernel}")


def _wanted(kernel: str, count: int) -> dict[str, dict[str, Any]]:
    decays = (0.9 + 0.01 * number for number in range(count))
    same = {"strategy": "ema", "kernel": kernel}
    return {f"average {decay:g}": {**same, "decay": decay} for decay in decays}


def _separate(model: nn.Module, wanted: Mapping[str, Mapping[str, Any]]) -> Callable[[], object]:
    averagers = [polyak.average(model, **options) for options in wanted.values()]

    def update() -> None:
        for averager in averagers:
            averager.update()

    return update
