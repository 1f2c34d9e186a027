"""One update where weights or average are short or long floats."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from polyak.bench.cases.common import absent_rows, compared_with, rows_of
from polyak.bench.entrants import PROPAGATE, entrants
from polyak.bench.field import Field, moved_bytes
from polyak.bench.libraries import LIBRARIES
from polyak.bench.limit import passes
from polyak.bench.memory import peak
from polyak.bench.race import race

if TYPE_CHECKING:
    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["PAIRS", "precision"]

PAIRS = {
    "bfloat16 weights, float32 average": (torch.bfloat16, torch.float32),
    "bfloat16 weights, bfloat16 average": (torch.bfloat16, torch.bfloat16),
    "float16 weights, float32 average": (torch.float16, torch.float32),
    "float64 weights, float64 average": (torch.float64, torch.float64),
}
"""The dtypes of weights and average. A bfloat16 average is rounded at random, else it would stand still."""


def precision(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of an update for each pair of dtypes; of the libraries, those that take one."""
    return [row for setting in PAIRS for row in _one(subject, settings, setting)]


def _one(subject: Subject, settings: Settings, setting: str) -> list[Row]:
    weights, stored = PAIRS[setting]
    device = settings.place
    able = [one for one in entrants(settings) if one.name not in LIBRARIES or LIBRARIES[one.name].typed]
    short = subject._replace(model=copy.deepcopy(subject.model).to(weights))
    field = Field(short.model, [one for one in able if one.name != PROPAGATE], stored)
    field.check()
    calls = {**field.updates, **passes(moved_bytes(short.model, stored), device)}
    samples = race(calls, settings.seconds / len(PAIRS), device, f"{setting}, {subject.name}")
    more = {
        name: {"peak": peak(call, device), "remark": field.remarks.get(name, "")}
        for name, call in field.updates.items()
    }
    rows = rows_of("precision", short, samples, compared_with(field), more=more, setting=setting)
    return [*rows, *absent_rows("precision", subject, field.absent, setting)]
