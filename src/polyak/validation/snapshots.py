"""What a snapshot says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from polyak.errors import StateError
from polyak.shown import shown
from polyak.validation.schema import Count, Schema, Settings, checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["About", "Recipe", "check_profile"]

_LONGEST = 1 << 28  # optimiser steps of a run that is synthesised: each of them is a number in memory
_DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_TOLERANCE = 1e-6  # of a sum of shares


def _dtype_name(name: str) -> str:
    if name not in _DTYPES:
        message = f"{shown(name)} is no dtype"
        raise ValueError(message)
    return name


def _number_as_text(text: str) -> str:
    float(text)
    return text


Share = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Layout(Schema):
    keys: dict[str, str]
    dtypes: dict[str, Annotated[str, AfterValidator(_dtype_name)]]
    averaged: list[str]


class Recipe(Schema):
    """A profile as the settings that make it."""

    strategy: Settings
    n: Annotated[int, Field(ge=1, le=_LONGEST)]
    every: Annotated[int, Field(ge=1, le=_LONGEST)]
    start: Annotated[int, Field(ge=-_LONGEST, le=_LONGEST)]
    origin: Literal["initial", "first"]


class _Shares(Schema):
    start_share: Share
    stride: Annotated[int, Field(ge=0, le=_LONGEST)]


class About(Schema):
    """What a snapshot says of itself."""

    average: Name
    step: Count
    profile: Recipe | _Shares
    layout: _Layout
    complex: list[str]
    run: str = ""
    summary: dict[str, Annotated[str, AfterValidator(_number_as_text)]] = Field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str, shapes: Mapping[str, tuple[int, ...]]) -> About:
        """Return what a snapshot says of itself.

        Args:
            raw: The table in its metadata.
            where: The file.
            shapes: The shapes of the tensors in it.

        Raises:
            StateError: If it is damaged or incomplete.
        """
        about = checked(cls, dict(raw), f"{where} is a damaged snapshot; its metadata", "Remove the file.")
        if problem := about.contradiction(shapes):
            message = f"{where} is a damaged snapshot: {problem}. Remove the file."
            raise StateError(message)
        return about

    def contradiction(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Return which two things in it cannot both be right; empty if there are none."""
        recipe, layout = self.profile, self.layout
        if isinstance(recipe, Recipe) and self.step != (last := recipe.start + (recipe.n - 1) * recipe.every):
            return f"it is of step {self.step}, and its profile ends at step {last}"
        if isinstance(recipe, _Shares) and not {"profile/shares", "profile/steps"} <= shapes.keys():
            return "its profile is missing"
        known = layout.dtypes.keys()
        if strange := [name for name in (*layout.keys.values(), *layout.averaged, *self.complex) if name not in known]:
            return f"it says nothing of the tensor {shown(strange[0])}"
        if missing := [name for name in known if f"weights/{name}" not in shapes]:
            return f"the tensor {shown(missing[0])} is missing"
        pairs = (name for name in self.complex if shapes[f"weights/{name}"][-1:] != (2,))
        return next((f"the tensor {shown(name)} holds no complex numbers" for name in pairs), "")


def check_profile(shares: NDArray[Any], steps: NDArray[Any], start: float, last: int) -> None:
    """Refuse what is no profile of a snapshot.

    Args:
        shares: The share of each update.
        steps: The optimiser step of each.
        start: The share of the start.
        last: The last step.

    Raises:
        ValueError: If shares, order or sums are wrong.
    """
    if shares.ndim != 1 or shares.shape != steps.shape:
        message = f"got shares of shape {shares.shape} and steps of shape {steps.shape}"
        raise ValueError(message)
    if not abs(float(shares.sum()) + start - 1.0) <= _TOLERANCE:  # also if it is NaN
        message = "its shares do not add up to 1"
        raise ValueError(message)
    if (int(steps[-1]) if len(steps) else 0) != last or (steps[1:] <= steps[:-1]).any():
        message = f"its steps do not increase up to step {last}"
        raise ValueError(message)
    if len(steps) and (last > _LONGEST or last - int(steps[0]) > _LONGEST):
        message = f"it reaches from step {steps[0]} to step {last}; {_LONGEST} steps are the most that fit in memory"
        raise ValueError(message)
