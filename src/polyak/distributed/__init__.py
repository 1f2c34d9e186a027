"""Averages on several ranks: whether these agree, and checkpoints that load on any number of them."""

from __future__ import annotations

from polyak.distributed.folders import load, save
from polyak.distributed.sync import broadcast, verify_in_sync

__all__ = ["broadcast", "load", "save", "verify_in_sync"]
