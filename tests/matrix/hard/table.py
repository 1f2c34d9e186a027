"""The second table, hard cases × libraries: for the terminal and as a page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..page import write  # noqa: TID252 - the tests are no package with a name of its own
from .cases import CASES, Case
from .subject import Subject
from .subjects import SUBJECTS
from .verdict import KINDS, Verdict, judge

Cells = Mapping[str, Mapping[str, Verdict]]
"""Verdicts by the name of the case and the title of the subject."""
STYLES = {"ok": "green", "wrong": "bold red", "error": "yellow", "no such feature": "dim"}
HEAD = """\
# Hard cases

What goes wrong with averages in practice, run on the real classes of other libraries and on polyak. This page is
written by `python3 noxfile.py -s matrix` (or by `python -m tests.matrix.hard` alone, which with `--cases` prints single
rows); each cell is what the code in `tests/matrix/hard` came to.
"""
MARKS = {"ok": "✓", "wrong": "✗", "error": "!", "no such feature": "–"}
_ROOM = 16  # columns of a terminal, for each column of the table
LEGEND = """\
- **ok**: right.
- **wrong (…)**: no exception, and this value instead of the right one.
- **error (…)**: an exception of this class where there should be none.
- **no such feature**: the library's documentation does not promise what the case asks for.
- **†**: right with an option or a method that the class itself offers; it is named below the table.

Each is used with its defaults, except for a constant decay from the first update on. What is held against it:

- A library that gives an averaged *model* is held to that model, buffers included. One that takes a list of parameters
  promises nothing about buffers.
- Averaging a weight with another one is wrong. Only where pairing by order is documented, or there are no names, a
  changed order is the user's own affair; a changed number of tensors or a changed shape is not.
"""


def cells(names: Iterable[str] = CASES) -> Cells:
    """Run cases on all subjects, and those that are not ok once more with each option of the class."""
    return {name: {subject.title: _cell(CASES[name], subject) for subject in SUBJECTS} for name in names}


def _cell(case: Case, subject: type[Subject]) -> Verdict:
    verdict = judge(case.run, subject)
    if verdict.kind == "ok":
        return verdict
    options = (variant.option for variant in subject.variants() if judge(case.run, variant).kind == "ok")
    return verdict._replace(option=next(options, ""))


def text(verdict: Verdict) -> str:
    """Return a cell in few words."""
    detail = {"wrong": verdict.note, "error": verdict.note.partition(":")[0]}.get(verdict.kind)
    return f"{verdict.kind}{f' ({detail})' if detail else ''}{' †' if verdict.option else ''}"


def terminal(cells: Cells, width: int) -> Table:
    """Return the table for a terminal; a narrow one shows marks, and numbers in the place of titles."""
    narrow = width < _ROOM * (1 + len(SUBJECTS))
    table = Table(title="hard cases", caption=_key() if narrow else None, caption_justify="left")
    table.add_column("case", overflow="fold")
    for number, title in enumerate(_titles(), start=1):
        table.add_column(str(number) if narrow else title, overflow="fold", no_wrap=narrow)
    for name, row in cells.items():
        said = (MARKS[verdict.kind] if narrow else text(verdict) for verdict in row.values())
        shown = (f"[{STYLES[verdict.kind]}]{each}[/]" for each, verdict in zip(said, row.values(), strict=True))
        table.add_row(CASES[name].title, *shown)
    table.add_section()
    for kind, counts in _counts(cells).items():
        table.add_row(kind, *counts)
    return table


def _key() -> str:
    titles = ", ".join(f"{number} {title}" for number, title in enumerate(_titles(), start=1))
    return f"{titles}. {', '.join(f'{mark} {kind}' for kind, mark in MARKS.items())}."


def page(cells: Cells) -> str:
    """Return the page."""
    rows = [[CASES[name].title, *map(_markdown, row.values())] for name, row in cells.items()]
    rows += [[f"**{kind}**", *counts] for kind, counts in _counts(cells).items()]
    table = [_line("case", *_titles()), _line(*["---"] * (1 + len(SUBJECTS))), *(_line(*row) for row in rows)]
    sections = [HEAD, "## The table\n", LEGEND, *table, "", "## The cases"]
    sections += [_section(CASES[name], row) for name, row in cells.items()]
    return "\n".join([*sections, "", _asked(), "", _ran_on()])


def report(out: Path, console: Console) -> bool:
    """Run everything, print the table, write the page, and return whether polyak is right in every case."""
    done = cells()
    console.print(terminal(done, console.width))
    write(out / "hard-cases.md", lambda path: path.write_text(page(done)))
    console.print(f"written: {out / 'hard-cases.md'}", soft_wrap=True)
    return all(row["polyak"].kind == "ok" for row in done.values())


def _titles() -> list[str]:
    return [subject.title for subject in SUBJECTS]


def _counts(cells: Cells) -> dict[str, list[str]]:
    counted = [Counter(row[title].kind for row in cells.values()) for title in _titles()]
    return {kind: [str(count[kind]) for count in counted] for kind in KINDS}


def _markdown(verdict: Verdict) -> str:
    marks = {"ok": "", "wrong": "**", "error": "**", "no such feature": "*"}[verdict.kind]
    return f"{marks}{text(verdict)}{marks}"


def _section(case: Case, row: Mapping[str, Verdict]) -> str:
    told = [(title, _told(verdict)) for title, verdict in row.items() if verdict.kind != "ok"]
    by_text: dict[str, list[str]] = {}
    for title, said in filter(lambda pair: pair[1], told):
        by_text.setdefault(said, []).append(title)
    lines = [f"- {', '.join(titles)}: {said}." for said, titles in by_text.items()]
    return "\n".join([f"\n### {case.title}\n", case.why, *([""] if lines else []), *lines])


def _told(verdict: Verdict) -> str:
    what = {"error": f"`{verdict.note}`", "no such feature": verdict.note}.get(verdict.kind, "")
    return "; ".join(filter(None, [what, verdict.option and f"right with {verdict.option}"]))


def _asked() -> str:
    rows = [_line(subject.title, subject.asked) for subject in SUBJECTS]
    return "\n".join(["## What each was asked for", "", _line("column", "code"), _line("---", "---"), *rows])


def _ran_on() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(s.distribution for s in SUBJECTS))
    return f"## What it ran on\n\nThe installed versions: {versions}. Python {platform.python_version()}, on the CPU.\n"


def _line(*row: str) -> str:
    return f"| {' | '.join(row)} |"
