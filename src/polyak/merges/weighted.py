"""Weighted sums: of the inputs, of their distances from the base, by importance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from polyak.errors import ConfigError
from polyak.merges.base import Merge
from polyak.merges.chunks import in_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["Finite", "Fisher", "Linear", "TaskArithmetic", "added", "changes_of", "weighted"]

Finite = Annotated[float, Field(allow_inf_nan=False)]


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of tensors."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor * weight)
    return total


def added(base: Tensor | None, change: Tensor, lam: float) -> Tensor:
    """Return the base with a change of it.

    Raises:
        ConfigError: If there is no base.
    """
    return _given(base) + (change if lam == 1.0 else change * lam)


def changes_of(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    """Return the changes of the inputs, in their memory.

    Raises:
        ConfigError: If there is no base.
    """
    return [tensor.sub_(_given(base)) for tensor in tensors]


def _given(base: Tensor | None) -> Tensor:
    if base is None:
        message = "this merge needs the checkpoint that the inputs were fine-tuned from; give base= (--base)"
        raise ConfigError(message)
    return base


class Linear(Merge):
    """The weighted mean: ``sum(w_i x_i)``.

    Source: Wortsman et al., "Model soups" (2022), arXiv:2203.05482; mergekit's ``linear`` with ``normalize``.

    Often confused with: ``task_arithmetic``, which adds the distances from a base instead of averaging them.
    """

    source: ClassVar[str] = "Wortsman et al. 2022, arXiv:2203.05482"
    elementwise: ClassVar[bool] = True

    name: Literal["linear"] = "linear"

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        if all(weight == 1.0 / len(tensors) for weight in about.weights):
            return torch.stack([*tensors]).sum(0).div_(len(tensors))
        return weighted(tensors, about.weights)


class TaskArithmetic(Merge):
    """The base with the sum of what each input changed: ``b + lam sum(w_i (x_i - b))``.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (2022), arXiv:2212.04089; mergekit's and PEFT's
    ``task_arithmetic`` and ``linear`` of adapters.

    Often confused with: ``linear``, which it equals where the weights add up to 1 and ``lam`` is 1.
    """

    source: ClassVar[str] = "Ilharco et al. 2022, arXiv:2212.04089"
    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    inputs: ClassVar[tuple[int, int | None]] = (1, None)
    elementwise: ClassVar[bool] = True
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "sum"

    name: Literal["task_arithmetic"] = "task_arithmetic"
    lam: Finite = 1.0
    """The factor of the sum; the paper chooses about 0.3 for eight tasks."""

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        changes = changes_of(tensors, base)
        return in_chunks(lambda parts, below: added(below, weighted(parts, about.weights), self.lam), changes, base)


class Fisher(Merge):
    """The mean by importance: ``sum(w_i F_i x_i) / sum(w_i F_i)`` with the diagonal Fisher information F.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (2021), arXiv:2111.09832.

    Often confused with: RegMean, which weighs by the inputs of each layer and not by gradients.
    """

    source: ClassVar[str] = "Matena & Raffel 2021, arXiv:2111.09832"
    elementwise: ClassVar[bool] = True

    name: Literal["fisher"] = "fisher"
    importance: tuple[str, ...]
    """A checkpoint for each input: the squared gradients, by the same names."""
    floor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """The least importance, so that values without any are averaged."""

    @override
    def extras(self) -> Sequence[str]:
        return self.importance

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        shares = [w * f.clamp(min=self.floor) for w, f in zip(about.weights, about.extras, strict=True)]
        total = torch.stack(shares).sum(0)
        return torch.stack([share * x for share, x in zip(shares, tensors, strict=True)]).sum(0).div_(total)
