"""What a merge is: frozen settings, and a function of tensors in float64."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from polyak.strategy.frozen import Frozen, similar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polyak.merges.about import About

__all__ = ["Merge"]


class Merge(Frozen):
    """A way to make one checkpoint of several: frozen settings and ``merge``.

    A subclass sees tensors in float64, never files, names of files, devices or dtypes.

    Examples:
        >>> from typing import Literal
        >>> import torch
        >>> class Largest(Merge):
        ...     '''The value that is farthest from zero.'''
        ...     name: Literal["largest"] = "largest"
        ...     elementwise = True
        ...     weighing = "none"
        ...     def merge(self, tensors, base, about):
        ...         stacked = torch.stack(list(tensors))
        ...         return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]

    Often confused with: a strategy, which is a distribution over the steps of one run. A merge may be no weighted mean.
    """

    name: str
    """The name on the command line; a subclass declares it as ``name: Literal["..."] = "..."``."""

    source: ClassVar[str] = ""
    """Where the formula comes from: paper, year, arXiv id, or the library and version matched."""

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    """Whether it takes the checkpoint that the inputs were fine-tuned from."""

    inputs: ClassVar[tuple[int, int | None]] = (2, None)
    """How many inputs it takes, from and to; None: any number. The base is not counted."""

    elementwise: ClassVar[bool] = False
    """Whether each value of the result depends on the same values of the inputs and on statistics alone, so that it
    may be given pieces of flat tensors; else it is given whole tensors."""

    weighing: ClassVar[Literal["mean", "sum", "none"]] = "mean"
    """What ``about.weights`` are: parts of a mean that add up to 1 (by default equal), factors of a sum (by default 1),
    or nothing that users may give."""

    symmetric: ClassVar[bool] = True
    """Whether the order of the inputs does not matter."""

    @abstractmethod
    def merge(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Tensor:
        """Return the merged tensor.

        Args:
            tensors: The inputs in float64; they may be changed in place.
            base: The base in float64, or None.
            about: What else is known of them.
        """

    def measure(self, tensors: Sequence[Tensor], base: Tensor | None, about: About) -> Any:  # noqa: ANN401 - whatever gather takes
        """Return one part of the input of ``gather``; defined only by merges that need a pass before.

        Args:
            tensors: As in ``merge``.
            base: As in ``merge``.
            about: As in ``merge``; ``about.statistics`` is what ``gather`` returned in the pass before, or None.
        """

    def gather(self, measured: Iterable[Any]) -> Any:  # noqa: ANN401 - whatever merge takes
        """Return statistics of the whole model, which ``merge`` gets as ``about.statistics``.

        Args:
            measured: What ``measure`` returned, one tensor or piece after the other; it can be walked through once.
        """

    def again(self, statistics: Any) -> bool:  # noqa: ANN401, ARG002 - as gather returns it
        """Return whether another pass of ``measure`` is needed."""
        return False

    def in_pieces(self) -> bool:
        """Return whether it may be given pieces; a setting may change what the class says."""
        return self.elementwise

    def measures(self) -> bool:
        """Return whether it needs a pass before."""
        return type(self).measure is not Merge.measure

    def extras(self) -> Sequence[str]:
        """Return paths of further checkpoints of the same model, one for each input, which ``about.extras`` are of."""
        return ()

    @classmethod
    @override
    def _hint(cls, key: str) -> str:
        known = [name for name in cls.model_fields if name != "name"]
        return f"{similar(key, known)} Known: {', '.join(known) or 'none'}."
