"""Averages of files: checkpoints that a run left behind, read in pieces and never executed."""

from __future__ import annotations

from polyak.files.average import Averaged, average
from polyak.files.checkpoint import Checkpoint, open_checkpoint as open  # noqa: A004 - as gzip.open
from polyak.files.weights import WSM, wsm

__all__ = ["WSM", "Averaged", "Checkpoint", "average", "open", "wsm"]
