"""What a reader finds in a file or folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.files.reading.raw import Stored

__all__ = ["Found"]


@dataclass
class Found:
    """Tensors by name, and what a reader knows of them.

    Attributes:
        format: The format in words.
        tensors: Where each tensor lies.
        step: The training step that the file itself records.
        texts: Its metadata.
        notes: What a user should know: parts that were skipped, other weights in the file.
        files: Of a folder: the names of the tensors of each file of weights, which is named without its type.
        key: The key in the dictionary in which the tensors were found.
    """

    format: str
    tensors: Mapping[str, Stored]
    step: int | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    key: str = ""
    files: dict[str, list[str]] = field(default_factory=dict)
