"""The schemas of all that comes back from files; nothing is adopted that they do not pass."""

from __future__ import annotations

from polyak.validation.snapshots import About, Recipe, RunsRecipe, SharesRecipe, check_profile, check_runs
from polyak.validation.states import FORMAT, SavedState, check_bank

__all__ = [
    "FORMAT",
    "About",
    "Recipe",
    "RunsRecipe",
    "SavedState",
    "SharesRecipe",
    "check_bank",
    "check_profile",
    "check_runs",
]
