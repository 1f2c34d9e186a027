"""The sources of Python's own standard library, cut into training, validation and test text by file."""

from __future__ import annotations

import string
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHARACTERS = string.printable
SYMBOLS = len(CHARACTERS) + 1  # the last one stands for every other character
FILES = {
    "validation": ("heapq", "random", "smtplib", "logging/__init__"),
    "test": ("ftplib", "gettext", "http/client", "json/decoder"),
    "training": (
        "argparse", "ast", "calendar", "configparser", "copy", "csv", "dataclasses", "datetime", "difflib", "doctest",
        "enum", "fractions", "functools", "inspect", "locale", "mailbox", "optparse", "pathlib", "pdb", "pickle",
        "pickletools", "pprint", "pydoc", "shutil", "socket", "statistics", "string", "subprocess", "tarfile",
        "tempfile", "textwrap", "threading", "tokenize", "traceback", "types", "typing", "unittest/case",
        "unittest/mock", "uuid", "zipfile",
    ),
}  # fmt: skip
"""Which files are which part. Where a Python has one no more, another file of its library takes the place."""


@dataclass(frozen=True)
class Text:
    """One part of the text, as numbers of characters."""

    symbols: Tensor

    def windows(self, count: int, length: int) -> Tensor:
        """Return windows of this length and one more, evenly spread over the text: always the same."""
        starts = torch.linspace(0, len(self.symbols) - length - 1, count).long()
        return self._at(starts, length)

    def random_windows(self, count: int, length: int) -> Tensor:
        """Return windows from anywhere."""
        return self._at(torch.randint(len(self.symbols) - length, (count,)), length)

    def _at(self, starts: Tensor, length: int) -> Tensor:
        return self.symbols[starts[:, None] + torch.arange(length + 1)]


def load(library: Path | None = None) -> dict[str, Text]:
    """Return the parts of the text.

    Args:
        library: Where the sources lie; None: where this Python has them.

    Raises:
        FileNotFoundError: There are too few.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    wanted = {name for names in FILES.values() for name in names}
    spare = iter(path for path in sorted(library.glob("*.py")) if path.stem not in wanted)
    parts: dict[str, Text] = {}
    for part, names in FILES.items():
        usual = [library / f"{name}.py" for name in names]
        found = [path if path.is_file() else next(spare, path) for path in usual]
        if not all(path.is_file() for path in found):
            raise FileNotFoundError(f"this Python came without the sources of its library in {str(library)!r}")
        text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in found)
        parts[part] = Text(torch.tensor([CHARACTERS.find(character) % SYMBOLS for character in text]))
    return parts
