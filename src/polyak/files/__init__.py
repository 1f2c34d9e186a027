"""Averages of files: checkpoints that a run left behind, read in pieces and never executed."""

from __future__ import annotations

from polyak.files.average import Averaged, average
from polyak.files.checkpoint import Checkpoint, open_checkpoint as open  # noqa: A004 - as gzip.open
from polyak.files.difference import Difference, TensorDifference, diff
from polyak.files.line import Line, path
from polyak.files.merge import Merged, merge, merges
from polyak.files.soup import Ingredient, Soup, soup
from polyak.files.weights import WSM, wsm
from polyak.merges.base import Merge

__all__ = [
    "WSM",
    "Averaged",
    "Checkpoint",
    "Difference",
    "Ingredient",
    "Line",
    "Merge",
    "Merged",
    "Soup",
    "TensorDifference",
    "average",
    "diff",
    "merge",
    "merges",
    "open",
    "path",
    "soup",
    "wsm",
]
