"""What a snapshot says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from polyak.errors import StateError
from polyak.errors.formatting import shown
from polyak.io.schema import LARGEST, Count, Schema, Settings, checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from polyak.strategy.profile import Profile

__all__ = ["About", "Recipe", "RunsRecipe", "SharesRecipe", "check_profile", "check_runs"]

_LONGEST = 1 << 28  # updates of a run that is synthesised: each of them is a number in memory
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


class _Made(Schema):
    """How the updates were made, which other averages of the run need to know; unknown in the first files."""

    counted: bool = True
    not_before: Count | None = None


class Recipe(_Made):
    """A profile as the settings that make it: one update each ``every`` steps, from the step ``start`` on."""

    strategy: Settings
    n: Annotated[int, Field(ge=1, le=_LONGEST)]
    every: Annotated[int, Field(ge=1, le=LARGEST)]
    start: Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    origin: Literal["initial", "first"]


class RunsRecipe(_Made):
    """A profile as the settings that make it, with the runs of updates of equal strides in a tensor."""

    strategy: Settings
    updates: Annotated[int, Field(ge=1, le=_LONGEST)]
    origin: Literal["initial", "first"]


class SharesRecipe(_Made):
    """A profile share by share."""

    start_share: Share
    stride: Count


class About(Schema):
    """What a snapshot says of itself."""

    average: Name
    step: Count
    profile: Recipe | RunsRecipe | SharesRecipe
    layout: _Layout
    complex: list[str]
    run: str = ""
    start: str = ""
    mark: str = ""
    summary: dict[str, Annotated[str, AfterValidator(_number_as_text)]] = Field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str, shapes: Mapping[str, tuple[int, ...]]) -> About:
        """Validate the metadata of a snapshot.

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
        if isinstance(recipe, SharesRecipe) and not {"profile/shares", "profile/steps"} <= shapes.keys():
            return "its profile is missing"
        if isinstance(recipe, RunsRecipe) and len(shapes.get("profile/runs", ())) != 2:  # noqa: PLR2004 - a table
            return "its profile is missing"
        known = layout.dtypes.keys()
        if strange := [name for name in (*layout.keys.values(), *layout.averaged, *self.complex) if name not in known]:
            return f"it says nothing of the tensor {shown(strange[0])}"
        if missing := [name for name in known if f"weights/{name}" not in shapes]:
            return f"the tensor {shown(missing[0])} is missing"
        pairs = (name for name in self.complex if shapes[f"weights/{name}"][-1:] != (2,))
        return next((f"the tensor {shown(name)} holds no complex numbers" for name in pairs), "")


def check_runs(runs: NDArray[Any], updates: int) -> None:
    """Refuse values that are not runs of updates: their number, their stride, and whether their steps were counted.

    Raises:
        ValueError: If numbers or sums are wrong.
    """
    if runs.shape[1:] != (3,) or (runs[:, :2] < 1).any() or not {*runs[:, 2].tolist()} <= {0, 1}:
        message = "its runs are no numbers of updates and strides"
        raise ValueError(message)
    rows = runs.tolist()
    if sum(count for count, *_ in rows) != updates or sum(count * stride for count, stride, _ in rows) > LARGEST:
        message = f"its runs are not of {updates} updates, or of too many steps"
        raise ValueError(message)


def check_profile(profile: Profile, last: int) -> None:
    """Refuse data that are not a profile of a snapshot.

    Args:
        profile: The profile.
        last: The last step.

    Raises:
        ValueError: If shares, order or sums are wrong.
    """
    shares, steps = profile.shares, profile.steps
    if shares.ndim != 1 or shares.shape != steps.shape:
        message = f"got shares of shape {shares.shape} and steps of shape {steps.shape}"
        raise ValueError(message)
    if not abs(float(shares.sum()) + profile.start - 1.0) <= _TOLERANCE:  # also if it is NaN
        message = "its shares do not add up to 1"
        raise ValueError(message)
    if (len(steps) and int(steps[-1]) != last) or (steps[1:] <= steps[:-1]).any():
        message = f"its steps do not increase up to step {last}"
        raise ValueError(message)
    if len(steps) and int(steps[0]) - profile.stride < -LARGEST:
        message = f"its first update, at step {int(steps[0])}, represents {profile.stride} steps"
        raise ValueError(message)
