"""What was evaluated already, in a file that survives an interruption at any moment."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import TYPE_CHECKING, Any

from polyak.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Journal", "identity"]

_NAME = "evaluations.jsonl"


class Journal:
    """Scores by what they are of: the hashes of the files in a mean, and the function.

    Args:
        folder: Where the journal lies; it is made if it is missing.
        function: What identifies the function.

    Raises:
        WriteError: If the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, function: str) -> None:
        self.file = folder / _NAME
        self._function = function
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as opened:
                opened.seek(0)
                lines = opened.read().split(b"\n")
                if lines[-1]:  # cut off in the middle: the next one begins on a line of its own
                    opened.write(b"\n")
        except OSError as error:
            message = f"the journal {str(self.file)!r} cannot be written: {error.strerror or error}; give another work="
            raise WriteError(message) from error
        self._known: dict[str, float] = {}
        for line in lines:
            self._read(line)

    def get(self, digests: Sequence[str]) -> float | None:
        """Return the score of a mean of files, or None."""
        return self._known.get(self._key(digests))

    def put(self, digests: Sequence[str], score: float, names: Sequence[str]) -> None:
        """Keep a score; afterwards it is on disk.

        Raises:
            WriteError: If it cannot be written, as on a full disk.
        """
        key = self._key(digests)
        line = json.dumps({"key": key, "score": score, "files": [*names]}) + "\n"
        try:
            with self.file.open("ab") as opened:
                opened.write(line.encode())
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            message = f"the journal {str(self.file)!r} cannot be written: {error.strerror or error}"
            raise WriteError(message) from error
        self._known[key] = score

    def _key(self, digests: Sequence[str]) -> str:
        return hashlib.sha256("\n".join([self._function, *sorted(digests)]).encode()).hexdigest()

    def _read(self, line: bytes) -> None:
        try:
            row: Any = json.loads(line)
            key, score = row["key"], row["score"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # what was cut off is evaluated again
        if isinstance(key, str) and isinstance(score, (int, float)):
            self._known[key] = float(score)


def identity(function: Callable[..., Any]) -> str:
    """Return a key that identifies a function: its name and its source, or its code where there is no source.

    Examples:
        >>> from math import sqrt
        >>> identity(sqrt)
        'math:sqrt:'
    """
    inner = inspect.unwrap(function)
    name = f"{getattr(inner, '__module__', '')}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    code = getattr(inner, "__code__", None)
    try:
        source = inspect.getsource(inner) if code is not None else ""
    except (OSError, TypeError):  # of an interactive session
        source = repr((code.co_code, code.co_consts, code.co_names)) if code is not None else ""
    return f"{name}:{hashlib.sha256(source.encode()).hexdigest() if source else ''}"
