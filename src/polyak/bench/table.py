"""Tables of a report: a head and rows of text, for the terminal and for the page."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from polyak.bench.cases import CASES
from polyak.bench.fit import lines
from polyak.bench.number import number
from polyak.errors.formatting import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polyak.bench.fit import Line
    from polyak.bench.report import Quantiles, Report, Row

__all__ = ["Table", "caption", "disturbed", "summaries", "tables"]

T = TypeVar("T")
_DISTURBED = 0.5
_REFERENCE = "reference"
# Not in summaries: kernels that are not chosen by default, and older classes of libraries that have a newer one.
_DETAILS = {"polyak loop", "polyak fused", "timm-v1", "timm-v2", "torch-swa", "flat add"}


class Table(NamedTuple):
    """Cells of text below a head, and lines below them; ``case`` is the name of what was measured."""

    case: str
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def tables(report: Report) -> list[Table]:
    """Return one table for each case of a report."""
    return [_table(case, list(rows)) for case, rows in groupby(report.rows, attrgetter("case"))]


def summaries(report: Report) -> list[Table]:
    """Return one short table for each case: a row for each model and setting, a column for each subject."""
    cases = [(case, list(rows)) for case, rows in groupby(report.rows, attrgetter("case"))]
    return [_summary(case, rows) for case, rows in cases if not CASES[case].alone]


def caption(report: Report) -> list[str]:
    """Return the footnotes of the tables: the machine, the versions, how it was measured."""
    took_part = ", ".join(f"{name} {release}" for name, release in report.versions.items())
    memory = (
        f"Memory: {report.memory}." if report.memory else "Memory was not measured: this device does not report it."
    )
    return [f"Machine: {report.machine}.", f"Versions: {took_part}.", memory, *report.notes]


def _table(case: str, rows: Sequence[Row]) -> Table:
    if CASES[case].alone:
        left_out = [row for row in rows if row.milliseconds is None]
        notes = [f"{row.model}, {row.setting}: {row.remark}." for row in left_out]
        return Table(case, CASES[case].title, *_cells(_GROWN, lines(rows)), notes)
    references = {row.reference for row in rows if row.reference}
    ratio = f"× {references.pop() if len(references) == 1 else _REFERENCE}"
    columns = {ratio if title == "×" else title: read for title, read in _COLUMNS.items()}
    return Table(case, CASES[case].title, *_cells(columns, rows), disturbed(rows))


def _summary(case: str, rows: Sequence[Row]) -> Table:
    shown = [row for row in rows if row.subject not in _DETAILS]
    references = {row.reference for row in shown if row.reference}

    def column(row: Row) -> str:
        return _REFERENCE if len(references) > 1 and row.subject in references else row.subject

    subjects = tuple(dict.fromkeys(map(column, shown)))
    names = ("model", "setting") if any(row.setting for row in shown) else ("model",)
    lines = []
    for named, of_one in groupby(shown, lambda row: tuple(getattr(row, name) for name in names)):
        cells = {column(row): _shortly(row) for row in of_one}
        lines.append((*named, *(cells.get(subject) or "-" for subject in subjects)))
    return Table(case, CASES[case].title, (*names, *subjects), lines, disturbed(shown))


def _shortly(row: Row) -> str:
    if row.share:
        return _share(row)
    if row.ratio and row.subject != row.reference:
        return number(row.ratio.median)
    return f"{number(row.milliseconds.median)} ms" if row.milliseconds else ""


def _cells(
    columns: Mapping[str, Callable[[T], str]], things: Iterable[T]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows, without empty columns."""
    things = list(things)
    cells = {title: [read(thing) for thing in things] for title, read in columns.items()}
    kept = {title: [cell or "-" for cell in column] for title, column in cells.items() if any(column)}
    return tuple(kept), list(zip(*kept.values(), strict=True))


def disturbed(rows: Sequence[Row]) -> list[str]:
    """Return that others kept a measurement waiting for a processor, where that was often."""
    measured = [row for row in rows if row.milliseconds]
    share = max((row.disturbed for row in measured), default=0.0)
    if share <= _DISTURBED:
        return []
    waited = f"{100 * share:.0f} %"
    return [
        f"Other programs kept this one waiting in up to {waited} of a row's samples: run it where nothing else runs."
    ]


def _median(quantiles: Quantiles | None) -> str:
    return number(quantiles.median) if quantiles else ""


def _share(row: Row) -> str:
    return f"{number(100 * row.share.median)} %" if row.share else ""


def _spread(ratio: Quantiles | None) -> str:
    return f"{number(ratio.median)} ({number(ratio.first)}–{number(ratio.third)})" if ratio else ""


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "setting": lambda row: row.setting,
    "subject": lambda row: row.subject,
    "ms": lambda row: _median(row.milliseconds),
    "×": lambda row: _spread(row.ratio),
    "× limit": lambda row: _median(row.limit),
    "share of a step": _share,
    "extra memory": lambda row: "" if row.peak is None else byte_size(row.peak, "MiB"),
    "kept memory": lambda row: "" if row.kept is None else byte_size(row.kept, "MiB"),
    "slowest rank, ms": lambda row: "" if row.slowest is None else number(row.slowest),
    "weights on a rank": lambda row: "" if row.weights is None else byte_size(row.weights, "MiB"),
    "average on a rank": lambda row: "" if row.held is None else byte_size(row.held, "MiB"),
    "a copy on each": lambda row: "" if row.whole is None else byte_size(row.whole, "MiB"),
    "remark": lambda row: row.remark,
}
_GROWN: dict[str, Callable[[Line], str]] = {
    "model": lambda line: line.model,
    "subject": lambda line: line.subject,
    "from": lambda line: f"{line.counts[0]:,} {line.counted}",
    "ms at first": lambda line: number(line.times[0]),
    "to": lambda line: f"{line.counts[-1]:,} {line.counted}",
    "ms at last": lambda line: number(line.times[-1]),
    "the line through all": lambda line: line.equation,
}
