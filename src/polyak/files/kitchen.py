"""Evaluates means of checkpoints for soups, each once in a lifetime."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from polyak.errors import ConfigError
from polyak.files.hashing import Digest
from polyak.files.mixed import metric, mixed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from polyak.files.checkpoint import Checkpoint
    from polyak.files.journal import Journal
    from polyak.files.plan import Entry

__all__ = ["Ingredient", "Kitchen", "sign_of"]


class Ingredient(NamedTuple):
    """A file that was tried.

    Attributes:
        file: The file.
        score: What it scores alone; NaN if that is no finite number.
        kept: Whether it is in the soup.
        soup: The score of the soup after it was tried.
    """

    file: Path
    score: float
    kept: bool
    soup: float


class Kitchen:
    """Evaluates means of files and notes their scores.

    Args:
        found: The files.
        entries: Their tensors, as planned.
        evaluate: Returns the score of a state dict.
        journal: Where scores are noted and found again.
    """

    def __init__(
        self,
        found: Sequence[Checkpoint],
        entries: Sequence[Entry],
        evaluate: Callable[[dict[str, Tensor]], float],
        journal: Journal,
    ) -> None:
        self._found, self._entries, self._evaluate, self._journal = found, entries, evaluate, journal
        self._digests = ["".join(Digest(file).finish() for file in one.raw_files()) for one in found]
        self.evaluations = 0

    def greedy(self, mode: Literal["max", "min"], rule: str) -> dict[int, Ingredient]:
        """Return the outcome for each file, by its number, in the order in which they were tried."""
        sign = sign_of(mode)
        alone = self._alone()
        order = sorted(alone, key=lambda number: -sign * alone[number] if math.isfinite(alone[number]) else math.inf)
        kept, best = [order[0]], alone[order[0]]
        ingredients = {order[0]: Ingredient(self._path(order[0]), best, kept=True, soup=best)}
        for number in order[1:]:
            tried = math.isfinite(alone[number])
            score = self._score([*kept, number]) if tried else math.nan
            better = sign * score > sign * best or (rule == "not_worse" and score == best)
            if better:
                kept, best = [*kept, number], score
            ingredients[number] = Ingredient(self._path(number), alone[number], kept=better, soup=best)
        return ingredients

    def uniform(self, mode: Literal["max", "min"]) -> dict[int, Ingredient]:
        """Return the same for the mean of all files, the best first."""
        sign = sign_of(mode)
        alone = self._alone()
        score = self._score([*alone])
        order = sorted(alone, key=lambda number: -sign * alone[number] if math.isfinite(alone[number]) else math.inf)
        return {number: Ingredient(self._path(number), alone[number], kept=True, soup=score) for number in order}

    def _alone(self) -> dict[int, float]:
        alone = {number: self._score([number]) for number in range(len(self._found))}
        if not any(map(math.isfinite, alone.values())):
            message = "evaluate() returned no finite number for any file"
            raise ConfigError(message)
        return alone

    def _score(self, numbers: Sequence[int]) -> float:
        digests = [self._digests[number] for number in numbers]
        known = self._journal.get(digests)
        if known is not None:
            return known
        ordered = sorted(numbers)
        state = mixed(self._entries, {number: 1.0 / len(ordered) for number in ordered})
        score = metric(self._evaluate, state, finite=False)
        self.evaluations += 1
        self._journal.put(digests, score, [self._path(number).name for number in numbers])
        return score

    def _path(self, number: int) -> Path:
        return self._found[number].path


def sign_of(mode: Literal["max", "min"]) -> float:
    """Return the factor that makes large scores good."""
    return 1.0 if mode == "max" else -1.0
