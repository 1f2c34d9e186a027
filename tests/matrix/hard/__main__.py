"""``python -m tests.matrix.hard``: run the hard cases on all libraries and write the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .cases import CASES
from .table import cells, report, terminal

DOCS = Path(__file__).parents[3] / "docs"


def main() -> int:
    """Print the table and write the page, or print some rows with all notes; 1 where polyak is not right."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.hard", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="NAME", help=f"print only: {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="where hard-cases.md is written")
    chosen, console = parser.parse_args(), Console()
    if not chosen.cases:
        return int(not report(chosen.out, console))
    done = cells(chosen.cases)
    console.print(terminal(done, console.width))
    for name, row in done.items():
        for title, verdict in row.items():
            console.print(f"{name}, {title}: {verdict.kind}; {verdict.note}; {verdict.option}", markup=False)
    return int(any(row["polyak"].kind != "ok" for row in done.values()))


if __name__ == "__main__":
    sys.exit(main())
