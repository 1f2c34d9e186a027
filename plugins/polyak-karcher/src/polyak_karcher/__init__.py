"""The Karcher mean of checkpoints on a sphere, as a merge for polyak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

import polyak

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.merges import About

__all__ = ["Karcher"]

_LEAST = 1e-300


class Karcher(polyak.files.Merge):
    """The point on the sphere with the least weighted sum of squared angles to all inputs, with their mean size.

    It walks along the mean of the logarithms: ``m <- exp_m(sum(w_i log_m(x_i)))``.

    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing".

    Often confused with: ``geometric_median``, which minimises distances in flat space and not squared angles.

    Examples:
        >>> a, b = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double()
        >>> from polyak.merges import About
        >>> Karcher().merge([a, b], None, About("w", (2,), 0, 2, (0.5, 0.5)))
        tensor([1.4142, 1.4142], dtype=torch.float64)
    """

    source: ClassVar[str] = "Karcher 1977; mergekit's karcher"

    name: Literal["karcher"] = "karcher"
    steps: Annotated[int, Field(ge=1)] = 100
    """How many steps at most."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-12
    """The length of a step, in radians, at which it ends."""

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        rows = torch.stack([tensor.reshape(-1) for tensor in tensors])
        weights = torch.tensor(about.weights, dtype=rows.dtype)
        sizes = rows.norm(dim=1)
        units = rows / sizes.clamp(min=_LEAST)[:, None]
        flat = weights @ rows
        mean = flat / flat.norm().clamp(min=_LEAST)
        for _ in range(self.steps):
            step = weights @ self._logarithms(mean, units)
            angle = float(step.norm())
            if angle <= self.tolerance:
                break
            mean = mean * torch.cos(step.norm()) + step * (torch.sin(step.norm()) / angle)
            mean = mean / mean.norm()
        made: Tensor = (weights @ sizes) * mean
        return made.reshape(about.shape)

    @staticmethod
    def _logarithms(mean: Tensor, units: Tensor) -> Tensor:
        """Return the direction and angle from the mean to each unit vector; 0 for what is no direction."""
        cosines = (units @ mean).clamp(-1.0, 1.0)
        tangents = units - cosines[:, None] * mean
        lengths = tangents.norm(dim=1)
        angles = torch.atan2(lengths, cosines)
        made: Tensor = torch.where(lengths[:, None] > 0, tangents * (angles / lengths.clamp(min=_LEAST))[:, None], 0.0)
        return made


@polyak.hookimpl
def polyak_merges() -> list[type[polyak.files.Merge]]:
    """Return the merges of this plugin."""
    return [Karcher]
