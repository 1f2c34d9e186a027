"""Means that one diverged input does not move: the median, the trimmed mean, the geometric median."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from polyak.errors import ConfigError
from polyak.merges.base import Merge
from polyak.merges.chunks import in_chunks
from polyak.merges.weighted import weighted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["GeometricMedian", "Median", "TrimmedMean"]

_CHUNK = 1 << 18  # values


class Median(Merge):
    """The median of each value; of an even number of inputs the mean of the two in the middle.

    Source: elementary; Yin et al., "Byzantine-Robust Distributed Learning" (2018), arXiv:1803.01498.

    Often confused with: ``torch.median``, which takes the lower of two.
    """

    source: ClassVar[str] = "Yin et al. 2018, arXiv:1803.01498"
    elementwise: ClassVar[bool] = True
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "none"

    name: Literal["median"] = "median"

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        ordered = torch.stack([*tensors]).sort(0).values
        half = len(tensors) // 2
        return ordered[half] if len(tensors) % 2 else (ordered[half - 1] + ordered[half]) / 2


class TrimmedMean(Merge):
    """The mean of each value without the largest and the smallest ones.

    Source: Yin et al., "Byzantine-Robust Distributed Learning" (2018), arXiv:1803.01498.

    Often confused with: ``breadcrumbs``, which trims each change by size and not across inputs.
    """

    source: ClassVar[str] = "Yin et al. 2018, arXiv:1803.01498"
    inputs: ClassVar[tuple[int, int | None]] = (3, None)
    elementwise: ClassVar[bool] = True
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "none"

    name: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[int, Field(ge=1)] = 1
    """How many values are dropped at either end."""

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        kept = len(tensors) - 2 * self.trim
        if kept < 1:
            message = f"trim: {self.trim} at either end leave none of {len(tensors)} inputs"
            raise ConfigError(message)
        return torch.stack([*tensors]).sort(0).values[self.trim : self.trim + kept].sum(0).div_(kept)


class GeometricMedian(Merge):
    """The point with the least sum of distances from all inputs, by Weiszfeld's iteration.

    It is a weighted mean of the inputs, whose weights need only their inner products.

    Source: Weiszfeld 1937; Pillutla et al., "Robust Aggregation for Federated Learning" (2019), arXiv:1912.13445.

    Often confused with: ``median``, which is taken for each value and may be far from all inputs.
    """

    source: ClassVar[str] = "Weiszfeld 1937; Pillutla et al. 2019, arXiv:1912.13445"
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "none"

    name: Literal["geometric_median"] = "geometric_median"
    scope: Literal["tensor", "model"] = "tensor"
    """Whether the distances are those of each tensor, or those of whole models."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-14
    """The change of the weights at which the iteration ends."""
    iterations: Annotated[int, Field(ge=1)] = 10_000
    """How many steps at most."""

    @override
    def in_pieces(self) -> bool:
        return self.scope == "model"

    @override
    def measures(self) -> bool:
        return self.scope == "model"

    @override
    def measure(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        flat = [tensor.reshape(-1) for tensor in tensors]
        products = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
        for begin in range(0, flat[0].numel(), _CHUNK):
            rows = torch.stack([row[begin : begin + _CHUNK] - flat[0][begin : begin + _CHUNK] for row in flat])
            products += rows @ rows.T
        return products

    @override
    def gather(self, measured: Iterable[Tensor]) -> list[float]:
        products: Tensor | None = None
        for one in measured:
            products = one if products is None else products + one
        return [1.0] if products is None else self._shares(products)

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        shares = about.statistics or self._shares(self.measure(tensors, base, about))

        def result(parts: Sequence[Tensor], _: Tensor | None) -> Tensor:
            return parts[0] + weighted([part - parts[0] for part in parts], shares)

        return in_chunks(result, tensors)

    def _shares(self, products: Tensor) -> list[float]:
        count = len(products)
        own = products.diagonal()
        shares = torch.full((count,), 1.0 / count, dtype=products.dtype, device=products.device)
        least = float(own.max()) * 1e-30
        for _ in range(self.iterations):
            middle = products @ shares
            squares = own - 2 * middle + shares @ middle
            near = squares.clamp(min=least).rsqrt() if least else torch.ones_like(shares)
            new = near / near.sum()
            if float((new - shares).abs().max()) <= self.tolerance:
                return new.tolist()
            shares = new
        return shares.tolist()
