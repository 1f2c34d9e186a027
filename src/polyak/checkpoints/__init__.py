"""Averagers saved to files and loaded from them."""

from __future__ import annotations

from polyak.checkpoints.files import load, save
from polyak.checkpoints.pickles import answer_to_former_names

__all__ = ["load", "save"]

answer_to_former_names()
