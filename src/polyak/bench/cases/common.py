"""What the cases share: from samples to rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from polyak.bench.entrants import REFERENCE
from polyak.bench.limit import LIMITS
from polyak.bench.models import size
from polyak.bench.report import Quantiles, Row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.bench.field import Field
    from polyak.bench.models import Subject
    from polyak.bench.race import Samples

__all__ = ["absent_rows", "compared_with", "group_of", "rows_of"]


def compared_with(field: Field) -> str:
    """Return the reference of a comparison: timm's V3, or the first entrant where it does not take part."""
    return REFERENCE if REFERENCE in field.updates else next(iter(field.updates), "")


def group_of(name: str) -> Literal["polyak", "library", "limit"]:
    """Return the library that a subject belongs to."""
    return "limit" if name in LIMITS else "polyak" if name.startswith("polyak") else "library"


def rows_of(
    case: str,
    subject: Subject,
    samples: Samples,
    reference: str,
    *,
    more: Mapping[str, Mapping[str, Any]] | None = None,
    **same: Any,
) -> list[Row]:
    """Return a row for each call: ``more`` are fields by the name of the call, ``same`` are fields of all."""
    limits = [name for name in LIMITS if name in samples.times]
    fastest = samples.fastest(limits) if limits else ""
    tensors, values = size(subject.model)
    rows = []
    for name in samples.times:
        fields: dict[str, Any] = {"group": group_of(name), **same, **(more or {}).get(name, {})}
        if reference in samples.times:
            fields |= {"ratio": Quantiles.of(samples.ratios(name, reference)), "reference": reference}
        if fastest:
            fields["limit"] = Quantiles.of(samples.ratios(name, fastest))
        times = Quantiles.of([1e3 * time for time in samples.of(name)])
        fields |= {"case": case, "model": subject.name, "subject": name}
        fields |= {"disturbed": samples.disturbed(name)}
        rows.append(Row(milliseconds=times, tensors=tensors, values=values, **fields))
    return rows


def absent_rows(case: str, subject: Subject, absent: Mapping[str, str], setting: str = "") -> list[Row]:
    """Return a row for each that could not take part, with the reason."""
    return [
        Row(case=case, model=subject.name, setting=setting, subject=name, group=group_of(name), remark=reason)
        for name, reason in absent.items()
    ]
