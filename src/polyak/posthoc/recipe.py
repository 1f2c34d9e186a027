"""A profile in a file: as the few settings that make it, or share by share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.config import AveragerConfig
from polyak.errors import StateError
from polyak.posthoc.schema import Recipe, RunsRecipe, check_profile, check_runs
from polyak.strategy.base import settings_of
from polyak.strategy.profile import Profile
from polyak.strategy.updates import Updates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from polyak.posthoc.schema import About, SharesRecipe
    from polyak.strategy.base import Strategy

__all__ = ["described", "from_description"]

_EXACT = 1e-12  # of the whole average


def described(profile: Profile, strategy: Strategy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a profile as plain types and tensors.

    That of a strategy that comes with polyak is its settings, a few bytes for any length of run, and 24 bytes more for
    each run of updates of equal strides. Any other one is 16 bytes for each update, and 8 for a learning rate.
    """
    made = profile.updates or Updates(profile.steps)
    made = made._replace(stride=profile.stride or int(np.diff(profile.steps[:2]).sum()) or 1)
    about: dict[str, Any] = {"counted": bool(np.all(made.counted)), "not_before": made.start}
    runs = _runs(made)
    if type(strategy).__module__.startswith("polyak.") and 0 < len(runs) * 3 <= max(len(profile) * 2, 12):
        for origin in ("initial", "first"):
            if Profile.at(strategy, made, origin).distance(profile) <= _EXACT:
                about |= {"strategy": settings_of(strategy), "origin": origin}
                if len(runs) == 1:
                    return {**about, "n": len(profile), "every": made.stride, "start": int(profile.steps[0])}, {}
                return {**about, "updates": len(profile)}, {"runs": torch.from_numpy(runs)}
    tensors = {"shares": torch.from_numpy(profile.shares.copy()), "steps": torch.from_numpy(profile.steps.copy())}
    if isinstance(made.lr, np.ndarray):
        tensors["lrs"] = torch.from_numpy(made.lr.copy())
    return {**about, "start_share": profile.start, "stride": profile.stride}, tensors


def _runs(made: Updates) -> NDArray[np.int64]:
    """Return runs of updates: how many, the stride of each, and whether their steps were counted."""
    n = len(made.steps)
    each = np.stack([made.strides, np.broadcast_to(made.counted, n).astype(np.int64)], axis=1)
    begin = np.flatnonzero(np.append(True, (each[1:] != each[:-1]).any(axis=1))) if n else np.empty(0, np.int64)
    return np.column_stack([np.diff(begin, append=n), each[begin]])


def from_description(about: About, tensors: Mapping[str, Tensor]) -> Profile:
    """Return the profile that ``described`` described.

    Raises:
        StateError: If it is damaged.
    """
    recipe = about.profile
    try:
        if isinstance(recipe, (Recipe, RunsRecipe)):
            strategy = AveragerConfig.of({"strategy": recipe.strategy}, "a snapshot's profile").strategy
            made = _regular(recipe) if isinstance(recipe, Recipe) else _in_runs(recipe, tensors["runs"], about.step)
            profile = Profile.at(strategy, made, recipe.origin)
        else:
            profile = _in_shares(recipe, tensors)
        check_profile(profile, about.step)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # a strategy may raise anything of these
        message = f"a snapshot's profile is damaged ({type(error).__name__}: {error})"
        raise StateError(message) from error
    return profile


def _regular(recipe: Recipe) -> Updates:
    regular = Updates.regular(recipe.n, every=recipe.every, first=recipe.start)
    return regular._replace(counted=recipe.counted, start=recipe.not_before)


def _in_runs(recipe: RunsRecipe, tensor: Tensor, last: int) -> Updates:
    runs = tensor.long().numpy()
    check_runs(runs, recipe.updates)
    counts, strides, counted = runs.T
    steps = np.cumsum(np.repeat(strides, counts))
    steps += last - steps[-1]
    return Updates(steps, int(strides[0]), None, np.repeat(counted, counts).astype(np.bool_), recipe.not_before)


def _in_shares(recipe: SharesRecipe, tensors: Mapping[str, Tensor]) -> Profile:
    shares, steps = tensors["shares"].double().numpy(), tensors["steps"].long().numpy()
    lr = tensors["lrs"].double().numpy() if "lrs" in tensors else None
    if lr is not None and (lr.shape != steps.shape or np.isnan(lr).any()):
        message = f"got learning rates of shape {lr.shape} for {len(steps)} updates"
        raise ValueError(message)
    made = Updates(steps, recipe.stride, lr, recipe.counted, recipe.not_before)
    return Profile(shares, steps, recipe.start_share, recipe.stride, made)
