"""Train once, choose the average later: snapshots of a run, and any average that they can be combined into."""

from __future__ import annotations

from polyak.posthoc.reader import Store
from polyak.posthoc.recorder import Recorder
from polyak.posthoc.result import Synthesis
from polyak.posthoc.sweep import Sweep, sweep
from polyak.posthoc.synthesis import synthesize

__all__ = ["Recorder", "Store", "Sweep", "Synthesis", "sweep", "synthesize"]
