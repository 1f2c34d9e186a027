"""Plots of averages: what each past step counts, and how a run went. Needs matplotlib."""

from __future__ import annotations

from polyak.plot.averages import POOR, curves, metrics, palette, shares
from polyak.plot.checkpoints import between, depths, scores

__all__ = ["POOR", "between", "curves", "depths", "metrics", "palette", "scores", "shares"]
