"""Interpolation along great circles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from polyak.merges.base import Merge
from polyak.merges.chunks import in_chunks
from polyak.merges.weighted import added, changes_of, weighted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["NuSlerp", "Slerp"]


class Slerp(Merge):
    """Spherical interpolation: ``(sin((1 - t) W) a + sin(t W) b) / sin W``, with W the angle between a and b.

    Source: Shoemake, "Animating rotation with quaternion curves" (1985); mergekit's ``slerp``.

    Often confused with: ``nuslerp``, whose t comes from weights, and which may work on distances from a base.
    """

    source: ClassVar[str] = "Shoemake 1985; mergekit's slerp"
    inputs: ClassVar[tuple[int, int | None]] = (2, 2)
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "none"
    symmetric: ClassVar[bool] = False

    name: Literal["slerp"] = "slerp"
    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The position: 0 is the first input, 1 the second."""
    scope: Literal["tensor", "model"] = "tensor"
    """Whether there is an angle for each tensor, or one for whole models."""
    straight: Annotated[float, Field(gt=0, le=1)] = 0.9995
    """The size of the cosine from which on the straight line is taken."""

    @override
    def in_pieces(self) -> bool:
        return self.scope == "model"

    @override
    def measures(self) -> bool:
        return self.scope == "model"

    @override
    def measure(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> tuple[float, float, float]:
        a, b = (tensor.reshape(-1) for tensor in tensors)
        return torch.dot(a, a).item(), torch.dot(b, b).item(), torch.dot(a, b).item()

    @override
    def gather(self, measured: Iterable[tuple[float, float, float]]) -> tuple[float, ...]:
        return tuple(map(math.fsum, zip(*measured, strict=True)))

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        first, second, product = about.statistics or self.measure(tensors, base, about)
        size = math.sqrt(first) * math.sqrt(second)
        cosine = max(-1.0, min(1.0, product / size)) if size else 1.0
        shares = 1.0 - self.t, self.t
        if abs(cosine) <= self.straight:
            angle = math.acos(cosine)
            shares = math.sin((1.0 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)
        return in_chunks(lambda parts, _: weighted(parts, shares), tensors)


class NuSlerp(Merge):
    """Spherical interpolation by weights: as ``slerp`` with ``t = w_2 / (w_1 + w_2)``.

    With a base it is taken of what the inputs changed.

    Source: mergekit's ``nuslerp``. ``scope="row"`` is its ``nuslerp_flatten: false``; ``scope="column"`` is that with
    ``nuslerp_row_wise: true``, which in spite of its name goes along the first dimension.

    Often confused with: ``slerp``, which takes the straight line for small angles already.
    """

    source: ClassVar[str] = "mergekit's nuslerp"
    base: ClassVar[Literal["required", "optional", "none"]] = "optional"
    inputs: ClassVar[tuple[int, int | None]] = (2, 2)

    name: Literal["nuslerp"] = "nuslerp"
    scope: Literal["tensor", "row", "column"] = "tensor"
    """Whether there is an angle for each tensor, for each row (the values along the last dimension), or for each column
    (the values along the first)."""

    _LEAST: ClassVar[float] = 1e-8  # of a sine

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        changes = tensors if base is None else changes_of(tensors, base)
        total = about.weights[0] + about.weights[1]
        t = about.weights[1] / total if total else 0.5
        a, b = changes
        if self.scope != "tensor" and a.ndim > 1:
            along = -1 if self.scope == "row" else 0
            sizes = [x.norm(dim=along, keepdim=True) for x in (a, b)]
            first, second = self._shares((a * b).sum(along, keepdim=True), sizes[0], sizes[1], t)
            made = a.mul_(first).add_(b.mul_(second))
            return made if base is None else added(base, made, 1.0)
        first, second = self._shares(torch.dot(a.reshape(-1), b.reshape(-1)), a.norm(), b.norm(), t)

        def result(parts: Sequence[Tensor], below: Tensor | None) -> Tensor:
            between = first * parts[0] + second * parts[1]
            return between if below is None else below + between

        return in_chunks(result, changes, base)

    def _shares(self, product: Tensor, a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return the weights of both inputs, by their product and sizes; on a straight line where they are colinear."""
        sizes = a * b
        cosine = torch.where(sizes > 0, product / sizes.clamp(min=1e-300), torch.ones_like(sizes))
        angle = cosine.clamp(-1.0, 1.0).acos()
        sine = angle.sin()
        curved = sine.abs() >= self._LEAST
        divisor = torch.where(curved, sine, torch.ones_like(sine))
        first = torch.where(curved, ((1.0 - t) * angle).sin() / divisor, torch.full_like(sine, 1.0 - t))
        second = torch.where(curved, (t * angle).sin() / divisor, torch.full_like(sine, t))
        return first, second
