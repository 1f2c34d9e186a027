"""Model Stock: between the mean and the base, as far as the angles between the changes say."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from typing_extensions import override

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.merges.base import Merge
from polyak.merges.chunks import in_chunks
from polyak.merges.weighted import added, changes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["ModelStock"]

_SINGULAR = 1e-6


class ModelStock(Merge):
    """A point between the mean m and the base: ``t m + (1 - t) b`` with ``t = k c / (1 + (k - 1) c)``.

    Here c is the mean cosine of the angles between the changes of the k inputs. Where they point against each other,
    c and t are negative.

    Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models" (2024), arXiv:2403.19522; mergekit's
    ``model_stock``, of which ``scope="row"`` is ``filter_wise``.

    Often confused with: task arithmetic with ``lam = t / k``, which it is for each tensor with a t of its own.
    """

    source: ClassVar[str] = "Jang et al. 2024, arXiv:2403.19522"
    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "none"

    name: Literal["model_stock"] = "model_stock"
    scope: Literal["tensor", "row"] = "tensor"
    """Whether there is an angle for each tensor, or for each row: the values along the last dimension."""

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        changes = changes_of(tensors, base)
        shape = changes[0].shape
        rows = [x.reshape(1, -1) if self.scope == "tensor" or x.ndim == 0 else x for x in changes]
        cosine = torch.stack([_cosine(a, b) for a, b in combinations(rows, 2)]).mean(0)
        count = len(rows)
        divisor = 1.0 + (count - 1) * cosine
        if bool((divisor.abs() < _SINGULAR).any()):
            message = (
                f"the changes of {shown(about.name)} cancel each other (mean cosine {cosine.min().item():.3g}), and "
                "model_stock divides by their sum; use 'linear' or 'task_arithmetic'"
            )
            raise ConfigError(message)
        ratio = count * cosine / divisor
        mean = rows[0]
        for row in rows[1:]:
            mean.add_(row)
        mean = mean.div_(count).mul_(ratio).reshape(shape)
        return in_chunks(lambda parts, below: added(below, parts[0], 1.0), [mean], base)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    sizes = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    product = torch.dot(a[0], b[0]).reshape(1, 1) if len(a) == 1 else (a * b).sum(-1, keepdim=True)
    cosine = product / sizes.clamp(min=1e-300)
    return torch.where(sizes > 0, cosine, torch.zeros_like(sizes)).clamp(-1.0, 1.0)
