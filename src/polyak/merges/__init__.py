"""Merges: ways to make one checkpoint of several, the built-in ones by family."""

from __future__ import annotations

from polyak.merges.about import About
from polyak.merges.base import Merge
from polyak.merges.model_stock import ModelStock
from polyak.merges.pruned import Breadcrumbs, Dare, Della, MagnitudePrune
from polyak.merges.robust import GeometricMedian, Median, TrimmedMean
from polyak.merges.spheres import NuSlerp, Slerp
from polyak.merges.ties import Ties
from polyak.merges.weighted import Fisher, Linear, TaskArithmetic

__all__ = [
    "BUILT_IN",
    "About",
    "Breadcrumbs",
    "Dare",
    "Della",
    "Fisher",
    "GeometricMedian",
    "Linear",
    "MagnitudePrune",
    "Median",
    "Merge",
    "ModelStock",
    "NuSlerp",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "TrimmedMean",
]

BUILT_IN = (
    Linear, TaskArithmetic, Slerp, NuSlerp, Ties, Dare, Della, Breadcrumbs, MagnitudePrune, ModelStock, Fisher,
    Median, TrimmedMean, GeometricMedian,
)  # fmt: skip
"""All of them, in the order in which they are listed."""
