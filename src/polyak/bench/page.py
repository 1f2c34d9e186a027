"""``python -m polyak.bench.page [--busy] PAGE.md … REPORT.json …``: fill pages by reports, and draw these.

In a page, the table of a case stands between ``<!-- bench: CASE -->`` and ``<!-- /bench -->``, its summary between
``<!-- bench: CASE-summary -->`` and the same end, and what the reports were measured on after
``<!-- bench: machine -->``. Each picture is written next to its report.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.bench.file_table import busy_files, draw_files, files_table
from polyak.bench.files import FilesReport
from polyak.bench.picture import draw
from polyak.bench.report import Report
from polyak.bench.table import caption, disturbed, summaries, tables
from polyak.errors import ConfigError, MissingFileError, PolyakError
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


def filled(page: str, reports: Sequence[Report], files: Sequence[FilesReport] = ()) -> str:
    """Return a page with the tables of the reports; cases that no report has stay as they are."""
    new = {table.case: markdown(table) for report in reports for table in tables(report)}
    new |= {table.case: markdown(table) for table in map(files_table, files)}
    new |= {f"{table.case}-summary": markdown(table) for report in reports for table in summaries(report)}
    lines = dict.fromkeys(line for report in reports for line in caption(report))
    if lines:
        new[_MACHINE] = "".join(f"- {line}\n" for line in lines)

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{new[found['name']]}\n{found[3]}" if found["name"] in new else found[0]

    return _BLOCK.sub(block, page)


def _write(page: Path, text: str) -> None:
    write_whole(page, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def main(*files: Path, busy: bool = False) -> None:
    """Refresh the pages and the pictures.

    Args:
        *files: Pages, whose names end in ``.md``, and reports.
        busy: Whether reports of a machine on which others were busy are taken.

    Raises:
        ConfigError: If there is no page or no report, or a report says that others were busy.
        MissingFileError: If a page is not there.
    """
    pages = [file for file in files if file.suffix == ".md"]
    saved = [file for file in files if file not in pages]
    if not pages or not saved:
        message = f"got {len(pages)} pages and {len(saved)} reports; expected PAGE.md … REPORT.json …"
        raise ConfigError(message)
    if missing := [str(page) for page in pages if not page.is_file()]:
        message = f"there is no page {missing[0]}"
        raise MissingFileError(message)
    of_files = {file: found for file in saved if (found := FilesReport.read(file)) is not None}
    reports = {file: Report.read(file) for file in saved if file not in of_files}
    remarks = {file: disturbed(report.rows) for file, report in reports.items()}
    remarks |= {file: busy_files(found) for file, found in of_files.items()}
    for file, lines in () if busy else remarks.items():
        for line in lines:
            message = f"{file}: {line} --busy takes it all the same."
            raise ConfigError(message)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        _write(page, filled(text, [*reports.values()], [*of_files.values()]))
    for file, report in reports.items():
        draw(report, file.with_suffix(".png"))
    for file, found in of_files.items():
        draw_files(found, file.with_suffix(".png"))


if __name__ == "__main__":
    try:
        given = [argument for argument in sys.argv[1:] if argument != "--busy"]
        main(*map(Path, given), busy="--busy" in sys.argv)
    except PolyakError as error:
        sys.exit(f"polyak: {error}")
