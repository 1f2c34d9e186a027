"""One update of an average: every kernel of polyak, every library, and the memory's limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.bench.cases.common import absent_rows, compared_with, rows_of
from polyak.bench.entrants import entrants
from polyak.bench.field import Field, moved_bytes
from polyak.bench.limit import passes
from polyak.bench.memory import peak
from polyak.bench.race import race

if TYPE_CHECKING:
    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["update"]


def update(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of an update, and the memory that it needs for itself.

    The weights stay as they are while the time is taken: what they are does not matter, how many bytes they have does.
    """
    device = settings.place
    field = Field(subject.model, entrants(settings))
    field.check()
    calls = {**field.updates, **passes(moved_bytes(subject.model), device)}
    samples = race(calls, settings.seconds, device, f"update {subject.name}")
    more = {
        name: {"peak": peak(call, device), "remark": field.remarks.get(name, "")}
        for name, call in field.updates.items()
    }
    return [
        *rows_of("update", subject, samples, compared_with(field), more=more),
        *absent_rows("update", subject, field.absent),
    ]
