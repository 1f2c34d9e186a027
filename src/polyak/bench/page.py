"""``python -m polyak.bench.page PAGE.md REPORT.json …``: put the tables of reports into a page, and draw them.

In the page, the table of a case stands between ``<!-- bench: CASE -->`` and ``<!-- /bench -->``, and what the reports
were measured on between ``<!-- bench: machine -->`` and the same end. Pictures are written beside the first report.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.bench.picture import draw
from polyak.bench.report import Report
from polyak.bench.table import caption, tables
from polyak.errors import PolyakError
from polyak.io.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.bench.table import Table

__all__ = ["filled", "markdown"]

_MACHINE = "machine"
_BLOCK = re.compile(r"(<!-- bench: (?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def markdown(table: Table) -> str:
    """Return a table as lines of Markdown."""
    rows = [table.head, tuple("---" for _ in table.head), *table.rows]
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows]
    return "".join(lines) + "".join(f"\n{note}\n" for note in table.notes)


def filled(page: str, reports: Sequence[Report]) -> str:
    """Return a page with the tables of the reports; cases that no report has stay as they are."""
    new = {table.case: markdown(table) for report in reports for table in tables(report)}
    told = dict.fromkeys(line for report in reports for line in caption(report))
    new[_MACHINE] = "".join(f"- {line}\n" for line in told)

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{new[found['name']]}\n{found[3]}" if found["name"] in new else found[0]

    return _BLOCK.sub(block, page)


def main(page: Path, *files: Path) -> None:
    """Refresh the page and the pictures."""
    reports = [Report.read(file) for file in files]
    text = filled(page.read_text(encoding="utf-8"), reports)
    write_whole(page, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    for report, file in zip(reports, files, strict=True):
        draw(report, file.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except PolyakError as error:
        sys.exit(f"polyak: {error}")
