"""The engine: one recursion on any model's tensors, whatever the strategy."""

from __future__ import annotations

from polyak.engine.averager import Averager
from polyak.engine.bank import Bank
from polyak.engine.engine import Engine

__all__ = ["Averager", "Bank", "Engine"]
