"""The host's work before the kernels of an update: what a fast accelerator has to wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.bench.cases.common import absent_rows, compared_with, rows_of
from polyak.bench.entrants import PROPAGATE, entrants
from polyak.bench.field import Field, shake
from polyak.bench.host import without_kernels
from polyak.bench.race import race

if TYPE_CHECKING:
    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["host"]

_OFF = ("timm-v1", "timm-v2", "torch-swa", "torch-ema", "polyak loop", PROPAGATE)
"""These move tensor by tensor or read the weights themselves: host and kernels cannot be separated from outside."""


def host(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of an update of which nothing is left but the host's own work."""
    field = Field(subject.model, [entrant for entrant in entrants(settings) if entrant.name not in _OFF])
    field.check()
    unmoved = {name: field.unmoved(name) for name in field.updates}
    shake(subject.model)
    with without_kernels():
        for update in field.updates.values():
            update()
        still = [name for name, same in unmoved.items() if same()]
        calls = {name: field.updates[name] for name in still}
        reference = compared_with(field)
        samples = race(calls, settings.seconds, settings.place, f"host {subject.name}", warm=2) if calls else None
    moved = {name: "its kernels cannot be switched off here" for name in unmoved if name not in still}
    more = {name: {"remark": remark} for name, remark in field.remarks.items()}
    rows = rows_of("host", subject, samples, reference, more=more) if samples else []
    return [*rows, *absent_rows("host", subject, {**field.absent, **moved})]
