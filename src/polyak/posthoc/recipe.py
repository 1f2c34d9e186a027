"""A profile in a file: as the few settings that make it, or share by share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.config import AveragerConfig
from polyak.errors import StateError
from polyak.profile import Profile
from polyak.validation import Recipe, check_profile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from polyak.strategy import Strategy
    from polyak.validation import About

__all__ = ["described", "from_description"]

_EXACT = 1e-13  # of the whole average


def described(profile: Profile, strategy: Strategy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a profile as plain types and tensors.

    A regular one of a strategy that comes with polyak is its settings, a few bytes for any length of run; any other
    one is 16 bytes for each update.
    """
    n = len(profile)
    strides = np.diff(profile.steps)
    regular = n > 1 and type(strategy).__module__.startswith("polyak.") and (strides == strides[:1]).all()
    if regular:
        every = int(strides[0])
        for origin in ("initial", "first"):
            start = int(profile.steps[0])
            same = Profile.of(strategy, n, every=every, first=start, origin=origin)
            if np.array_equal(same.steps, profile.steps) and same.distance(profile) <= _EXACT:
                cadence = {"n": n, "every": every, "start": start, "origin": origin}
                return {"strategy": strategy.model_dump(mode="json"), **cadence}, {}
    tensors = {"shares": torch.from_numpy(profile.shares.copy()), "steps": torch.from_numpy(profile.steps.copy())}
    return {"start_share": profile.start, "stride": profile.stride}, tensors


def from_description(about: About, tensors: Mapping[str, Tensor]) -> Profile:
    """Return the profile that ``described`` described.

    Raises:
        StateError: If it is damaged.
    """
    recipe = about.profile
    try:
        if isinstance(recipe, Recipe):
            strategy = AveragerConfig.of({"strategy": recipe.strategy}, "a snapshot's profile").strategy
            profile = Profile.of(strategy, recipe.n, every=recipe.every, first=recipe.start, origin=recipe.origin)
        else:
            shares, steps = tensors["shares"].double().numpy(), tensors["steps"].long().numpy()
            profile = Profile(shares, steps, recipe.start_share, recipe.stride)
        check_profile(profile.shares, profile.steps, profile.start, about.step)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # a strategy may raise anything of these
        message = f"a snapshot's profile is damaged ({type(error).__name__}: {error})"
        raise StateError(message) from error
    return profile
