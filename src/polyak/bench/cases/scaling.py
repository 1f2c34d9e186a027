"""How the cost of an update grows with the number of tensors, and with the number of values."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from polyak.bench.cases.common import absent_rows, compared_with, rows_of
from polyak.bench.entrants import DEFAULTS, REFERENCE, libraries, polyaks
from polyak.bench.field import Field, moved_bytes
from polyak.bench.limit import passes
from polyak.bench.memory import available
from polyak.bench.models import Subject, layers
from polyak.bench.race import race
from polyak.bench.report import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.bench.entrants import Entrant
    from polyak.bench.settings import Settings

__all__ = ["SERIES", "scaling"]

_TENSORS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_VALUES = (*(digit * 10**power for power in range(4, 9) for digit in (1, 3)), 10**9)
_RACING = 0.3
"""The share of the time that goes into rounds; the rest makes models and averages."""


def _hundred(values: int) -> nn.Module:
    return nn.ParameterList(torch.zeros(values // 100) for _ in range(100))


class Series(NamedTuple):
    """Models that grow: what is counted, how one of a count is made, and the counts."""

    counted: str
    make: Callable[[int], nn.Module]
    counts: tuple[int, ...]


SERIES: dict[str, Series] = {
    "tensors of 64 values": Series("tensors", layers, _TENSORS),
    "100 tensors": Series("values", _hundred, _VALUES),
}
"""Names to series."""


def scaling(settings: Settings) -> list[Row]:
    """Return the time of an update for models that grow, until the time or the memory is used up."""
    return [row for name in SERIES for row in _series(name, settings)]


def _series(name: str, settings: Settings) -> list[Row]:
    counted, make, counts = SERIES[name]
    rows: list[Row] = []
    Field(make(counts[0]).to(settings.place), _chosen(settings))  # loads and compiles what the first one would
    began, took, before = perf_counter(), 0.0, counts[0]
    for count in counts:
        setting, started = f"{count:,} {counted}", perf_counter()
        left = settings.seconds - (started - began)
        if reason := _too_much(counted, count, left, took * count / before, settings):
            return [*rows, Row(case="scaling", model=name, setting=setting, subject="-", group="limit", remark=reason)]
        field = Field(make(count).to(settings.place), _chosen(settings))
        field.warm_up()
        took, before = perf_counter() - started, count
        rows += _point(Subject(name, field.model), field, setting, settings)
    return rows


def _too_much(counted: str, count: int, left: float, needed: float, settings: Settings) -> str:
    """Return why a point is not measured, or "": memory for the model, the averages and two passes, and time."""
    values = count * 64 if counted == "tensors" else count
    averages = len(_chosen(settings))
    nbytes, free = 4 * values * (1 + averages + 3), available(settings.place)
    if free is not None and nbytes > 0.8 * free:
        return f"not measured: it needs {nbytes / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    if needed > left:
        return f"not measured: it takes about {needed:.0f} s, and {max(left, 0):.0f} of {settings.seconds:g} s are left"
    return ""


def _chosen(settings: Settings) -> list[Entrant]:
    ours = [one for one in polyaks(settings) if one.name != DEFAULTS]
    return [*ours, *(one for one in libraries(settings) if one.name == REFERENCE)]


def _point(subject: Subject, field: Field, setting: str, settings: Settings) -> list[Row]:
    calls = {**field.updates, **passes(moved_bytes(subject.model), settings.place)}
    samples = race(calls, _RACING * settings.seconds / len(_VALUES), settings.place, setting)
    rows = rows_of("scaling", subject, samples, compared_with(field), setting=setting)
    return [*rows, *absent_rows("scaling", subject, field.absent, setting)]
