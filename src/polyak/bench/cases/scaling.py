"""How the cost of an update grows with the number of tensors, and with the number of values."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from polyak.bench.cases.common import absent_rows, compared_with, rows_of
from polyak.bench.entrants import PROPAGATE, REFERENCE, libraries, polyaks
from polyak.bench.field import Field, moved_bytes
from polyak.bench.limit import passes
from polyak.bench.memory import available
from polyak.bench.models import Subject, layers
from polyak.bench.race import race
from polyak.bench.report import Row
from polyak.errors.formatting import byte_size

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
    """Return the time of an update for models that grow, until the time or the memory is used up.

    Where there is no memory for all that was asked for, the first kernel and timm's V3 are measured alone.
    """
    return [row for name in SERIES for row in _series(name, settings)]


def _series(name: str, settings: Settings) -> list[Row]:
    counted, make, counts = SERIES[name]
    rows: list[Row] = []
    Field(make(counts[0]).to(settings.place), _chosen(settings))  # loads and compiles what the first one would
    began, took, before = perf_counter(), 0.0, counts[0]
    for count in counts:
        setting, started = f"{count:,} {counted}", perf_counter()
        left = settings.seconds - (started - began)
        chosen, reason = _affordable(count * 64 if counted == "tensors" else count, settings)
        if (needed := took * count / before) > left:
            reason = f"it takes about {needed:.0f} s, and {max(left, 0):.0f} of {settings.seconds:g} s are left"
            chosen = []
        if reason:
            remark = f"{'partly' if chosen else 'not'} measured: {reason}"
            rows.append(Row(case="scaling", model=name, setting=setting, subject="-", group="limit", remark=remark))
        if not chosen:
            return rows
        field = Field(make(count).to(settings.place), chosen)
        field.warm_up()
        took, before = perf_counter() - started, count
        rows += _point(Subject(name, field.model), field, setting, settings, alone=bool(reason))
        del field  # before the memory for the next one is counted
    return rows


def _affordable(values: int, settings: Settings) -> tuple[list[Entrant], str]:
    """Return the entrants that fit in memory with the model and two passes, and why the others do not, or ""."""
    chosen, one, free = _chosen(settings), 4 * values, available(settings.place)
    if free is None or one * (len(chosen) + 4) <= 0.8 * free:
        return chosen, ""
    lacks = f"all of it needs {byte_size(one * (len(chosen) + 4))} of memory, and {byte_size(free)} are free"
    fewer = [*chosen[:1], *(entrant for entrant in chosen[1:] if entrant.name == REFERENCE)]
    return fewer if one * (len(fewer) + 1) <= 0.8 * free else [], lacks


def _chosen(settings: Settings) -> list[Entrant]:
    ours = [one for one in polyaks(settings) if one.name != PROPAGATE]
    return [*ours, *(one for one in libraries(settings) if one.name == REFERENCE)]


def _point(subject: Subject, field: Field, setting: str, settings: Settings, *, alone: bool) -> list[Row]:
    limits = {} if alone else passes(moved_bytes(subject.model), settings.place)
    seconds = _RACING * settings.seconds / len(_VALUES)
    samples = race({**field.updates, **limits}, seconds, settings.place, setting)
    rows = rows_of("scaling", subject, samples, compared_with(field), setting=setting)
    return [*rows, *absent_rows("scaling", subject, field.absent, setting)]
