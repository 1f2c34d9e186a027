"""Changes of which a part is dropped, at random or by size, before they are added up."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import override

from polyak.merges.base import Merge
from polyak.merges.chance import Ranks, Rescale, blocks, keep
from polyak.merges.chunks import in_chunks
from polyak.merges.election import Divide, Elect, agreed, elected
from polyak.merges.trimming import count_of, trim
from polyak.merges.weighted import Finite, added, changes_of, weighted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["Breadcrumbs", "Dare", "Della", "MagnitudePrune", "Pruned"]

Density = Annotated[float, Field(gt=0, le=1)]


class Pruned(Merge):
    """The base with the sum of pruned changes, or with the mean of those that agree in sign."""

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    inputs: ClassVar[tuple[int, int | None]] = (1, None)
    weighing: ClassVar[Literal["mean", "sum", "none"]] = "sum"

    then: Literal["linear", "ties"] = "linear"
    """Whether the changes are added up, or a sign is elected and those that agree are averaged."""
    elect: Elect = "weighted_mass"
    """With ``then="ties"``: what elects the sign."""
    divide: Divide = "weights"
    """With ``then="ties"``: what the sum is divided by."""
    lam: Finite = 1.0
    """The factor of the merged change."""

    @abstractmethod
    def prune(self, change: Tensor, number: int, about: About) -> None:
        """Set a part of a change to 0, in place.

        Args:
            change: The change, contiguous.
            number: The number of the input.
            about: What else is known.
        """

    @override
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        changes = changes_of(tensors, base)
        for number, change in enumerate(changes):
            self.prune(change, number, about)
        return in_chunks(lambda parts, below: self._joined(parts, below, about), changes, base)

    def _joined(self, changes: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        if self.then == "linear":
            return added(base, weighted(changes, about.weights), self.lam)
        votes = elected(changes, about.weights, self.elect)
        return added(base, agreed(changes, about.weights, votes, self.divide, 1.0), self.lam)


class Dare(Pruned):
    """Drop and rescale: each value of a change is kept by chance, and what is kept is made larger.

    With the chance ``density``, ``t_i = mask_i (x_i - b) / density``; the result is ``b + lam sum(w_i t_i)``, whose
    mean over seeds is task arithmetic.

    Source: Yu et al., "Language Models are Super Mario" (2023), arXiv:2311.03099, and PEFT's ``dare_linear`` and
    ``dare_ties``: ``rescale="density"``. mergekit's ``dare_linear`` and ``dare_ties``: ``rescale="l1"``.

    Often confused with: the paper's p, which is the part that is dropped: ``density = 1 - p``.
    """

    source: ClassVar[str] = "Yu et al. 2023, arXiv:2311.03099"
    elementwise: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False  # each input has a mask of its own

    name: Literal["dare"] = "dare"
    density: Density = 0.1
    """The chance of a value to be kept."""
    rescale: Rescale = "density"
    """Whether to divide by the chance, to keep the L1 norm of each tensor, or to do nothing."""

    @override
    def in_pieces(self) -> bool:
        return self.rescale != "l1"

    @override
    def prune(self, change: Tensor, number: int, about: About) -> None:
        if self.density < 1:
            density = torch.tensor(self.density, dtype=change.dtype, device=change.device)
            keep(change, number, about, lambda *_: density, self.rescale, blocks(change.numel(), 1))


class Della(Pruned):
    """Drop by chance, large values less often.

    In each row the chance of the value of rank r of n, from 0 up, is ``density - epsilon + 2 epsilon r / (n - 1)``.
    Equal values have the mean of their ranks.

    Source: Deep et al., "DELLA-Merging" (2024), arXiv:2406.11617, with ``rescale="density"``, which divides by the
    chance of each value, and ``then="ties"``; mergekit's ``della`` and ``della_linear``: ``rescale="l1"``.

    Often confused with: ``dare``, where all chances are equal.
    """

    source: ClassVar[str] = "Deep et al. 2024, arXiv:2406.11617"
    symmetric: ClassVar[bool] = False

    name: Literal["della"] = "della"
    density: Density = 0.5
    """The mean chance of a value to be kept."""
    epsilon: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """How far chances are from the mean at most."""
    rescale: Rescale = "density"
    """Whether to divide by the chances, to keep the L1 norm of each tensor, or to do nothing."""
    then: Literal["linear", "ties"] = "ties"
    """Whether the changes are added up, or a sign is elected and those that agree are averaged."""

    @model_validator(mode="after")
    def _is_a_chance(self) -> Self:
        if self.density < 1 and not (self.density - self.epsilon >= 0 and self.density + self.epsilon <= 1):
            message = f"density ± epsilon, {self.density:g} ± {self.epsilon:g}, leaves the chances from 0 to 1"
            raise ValueError(message)
        return self

    @override
    def prune(self, change: Tensor, number: int, about: About) -> None:
        if self.density == 1 or not change.numel():
            return
        length = change.shape[-1] if change.ndim > 1 else change.numel()

        ranks = Ranks(length)

        def chance(flat: Tensor, begin: int, end: int) -> Tensor:
            if length == 1:
                return torch.full_like(flat[begin:end], self.density)
            rank = ranks(flat, begin, end).to(flat.dtype)
            return self.density - self.epsilon + 2 * self.epsilon * rank / (length - 1)

        keep(change, number, about, chance, self.rescale, blocks(change.numel(), length))


class Breadcrumbs(Pruned):
    """Drop the largest and the smallest values of each change.

    Of n values ``int(gamma n)`` of the largest are dropped, and of the rest ``int(density n)`` of the largest are kept.

    Source: Davari and Belilovsky, "Model Breadcrumbs" (2023), arXiv:2312.06795; mergekit's ``breadcrumbs``, and with
    ``then="ties"`` its ``breadcrumbs_ties``.

    Often confused with: ``magnitude_prune``, which drops small values alone.
    """

    source: ClassVar[str] = "Davari & Belilovsky 2023, arXiv:2312.06795"

    name: Literal["breadcrumbs"] = "breadcrumbs"
    density: Density = 0.9
    """The part that is kept."""
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """The part of the largest values that is dropped."""

    @override
    def prune(self, change: Tensor, number: int, about: About) -> None:
        values = change.numel()
        kept = count_of(self.density, values)
        top = min(int(self.gamma * values), values - kept)  # the density counts more than gamma
        trim(trim(change, top, largest=True), kept)


class MagnitudePrune(Pruned):
    """Drop the smallest values of each change: ``int(density n)`` of n values are kept, and added up.

    Source: PEFT's ``magnitude_prune``; Yadav et al. 2023, arXiv:2306.01708, trims alike.

    Often confused with: ``ties``, which averages what agrees in sign instead of adding up everything.
    """

    source: ClassVar[str] = "PEFT's magnitude_prune"

    name: Literal["magnitude_prune"] = "magnitude_prune"
    density: Density = 0.2
    """The part that is kept."""

    @override
    def prune(self, change: Tensor, number: int, about: About) -> None:
        trim(change, count_of(self.density, change.numel()))
