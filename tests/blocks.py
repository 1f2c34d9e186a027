"""The code blocks of a page: run from the top, and compared with what the page says they print."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from doctest import ELLIPSIS, Example as Shown, OutputChecker
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sybil import Example, Region
    from sybil.document import Document


class Blocks:
    """A sybil parser of fenced blocks: python is run, ``text`` is what the python above it printed, a title is a file.

    Args:
        alone: Whether each block starts from nothing, for pages of which a reader copies one block.
    """

    _info = re.compile(r'(?P<language>[a-z]+)(?: +title="(?P<title>[^"]+)")?[ \t]*\n')

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._printed: str | None = None

    def __call__(self, document: Document) -> Iterator[Region]:
        for region in RawFencedCodeBlockLexer(self._info)(document):
            by_language: dict[str, Callable[[Example], None]] = {"python": self._run, "text": self._compare}
            region.parsed = region.lexemes["source"]
            region.evaluator = self._write if region.lexemes["title"] else by_language.get(region.lexemes["language"])
            if region.evaluator is not None:
                yield region

    def _run(self, example: Example) -> None:
        if self._alone:
            example.namespace.clear()
        example.namespace["__name__"] = "__main__"
        with redirect_stdout(io.StringIO()) as out:
            PythonEvaluator()(example)
        self._printed = out.getvalue()

    def _compare(self, example: Example) -> None:
        assert self._printed is not None, f"{example!r} shows the output of nothing"
        checker = OutputChecker()
        if not checker.check_output(example.parsed, self._printed, ELLIPSIS):
            pytest.fail(f"{example!r}\n{checker.output_difference(Shown('', example.parsed), self._printed, ELLIPSIS)}")

    def _write(self, example: Example) -> None:
        file = Path(example.region.lexemes["title"])
        assert not file.is_absolute()
        assert ".." not in file.parts
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(example.parsed, encoding="utf-8")
