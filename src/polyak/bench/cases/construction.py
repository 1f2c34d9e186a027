"""Making an average: the time and the memory it takes, compared with ``copy.deepcopy(model)``."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from polyak.bench.cases.common import absent_rows, rows_of
from polyak.bench.entrants import entrants
from polyak.bench.field import Field
from polyak.bench.memory import use
from polyak.bench.race import race

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from polyak.bench.entrants import Entrant
    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["construction"]

COPY = "copy.deepcopy"


def construction(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of making an average, its memory, and the memory at the worst moment of making it."""
    device, chosen = settings.place, _one_per_strategy(entrants(settings))
    field = Field(torch.nn.Linear(2, 2, device=device), chosen)  # loads what is loaded at first use
    calls = {COPY: lambda: copy.deepcopy(subject.model)} | {
        entrant.name: _making(entrant, subject.model) for entrant in chosen if entrant.name in field.updates
    }
    memory = {name: use(call, device) for name, call in calls.items()}
    more = {name: {"peak": one.peak, "kept": one.kept} for name, one in memory.items() if one}
    samples = race(calls, settings.seconds, device, f"construction {subject.name}")
    return [
        *rows_of("construction", subject, samples, COPY, more=more),
        *absent_rows("construction", subject, field.absent),
    ]


def _one_per_strategy(every: list[Entrant]) -> list[Entrant]:
    """Leave out polyak with other kernels: a kernel is chosen later."""
    ours = {entrant.strategy: entrant for entrant in reversed(every) if entrant.group == "polyak"}
    return [entrant for entrant in every if entrant.group == "library" or entrant in ours.values()]


def _making(entrant: Entrant, model: nn.Module) -> Callable[[], object]:
    return lambda: entrant.make(model, None)
