"""Where an average lives that its user keeps: in the tensors of a module, of a mapping or of a list."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyak.errors import MismatchError
from polyak.errors.formatting import listed
from polyak.tensors.changes import ChangeDetector
from polyak.tensors.entries import as_model, walk
from polyak.tensors.storage import refuse_unfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.tensors.entries import Entry, Given, Model
    from polyak.tensors.storage import Stored

__all__ = ["Home"]

_SHOWN = 6


class Home:
    """The user's own tensors that hold an average: what is written into them is the average from then on.

    Args:
        given: A module, a mapping of names to tensors, or a list of tensors in the model's order. A list or a mapping
            may be filled with other tensors later; a module may be moved or converted.

    Attributes:
        given: What was given.

    Raises:
        ModelError: If it holds no tensors, or some without values of their own.
    """

    def __init__(self, given: Given) -> None:
        self.given = given if isinstance(given, (nn.Module, dict, list)) else as_model(given)
        self._tensors: dict[str, Tensor] = {}
        self._detector, self._epoch = self._look()

    @property
    def module(self) -> nn.Module | None:
        """The user's module, if it is one."""
        return self.given if isinstance(self.given, nn.Module) else None

    def moved(self) -> bool:
        """Return whether it holds other tensors than at the last look, or the same in other memory."""
        held = isinstance(self.given, nn.Module) or self._detector.holds(self._model())
        return not (held and self._detector.unchanged()) or self._detector.epoch != self._epoch

    def look(self) -> None:
        """Find its tensors anew."""
        self._detector, self._epoch = self._look()

    def housed(self, stored: Sequence[Stored], entries: Sequence[Entry] | None = None) -> list[Stored]:
        """Return the stored tensors with these as their averages.

        Args:
            stored: What is stored.
            entries: All that the model has, skipped tensors too. Defaults to whatever it has.

        Raises:
            MismatchError: If a name is missing or too many, or a shape or a dtype does not fit.
        """
        known = self._tensors.keys() if entries is None else {alias for entry in entries for alias in entry.aliases}
        missing = [s.name for s in stored if s.name not in self._tensors]
        strange = [name for name in self._tensors if name not in known and self._averaged(name)]
        unlike = [f"{s.name} {problem}" for s in stored if s.name not in missing and (problem := self._unlike(s))]
        problems = [*(f"{name} is missing" for name in missing), *unlike, *(f"{name} is unknown" for name in strange)]
        if problems:
            message = (
                f"into= does not have the model's tensors: {listed(problems[:_SHOWN])}; give a copy of the model, as "
                "copy.deepcopy(model), or one tensor for each of its tensors"
            )
            raise MismatchError(message)
        return [self._own(s) for s in stored]

    def filled(self, stored: Sequence[Stored]) -> list[Stored]:
        """Write the averages of stored tensors into these, and return them with these as their averages; idempotent."""
        made = self.housed(stored)
        with torch.no_grad():
            for own, s in zip(made, stored, strict=True):
                if own is not s:
                    own.average.copy_(s.average)
        return made

    def _own(self, stored: Stored) -> Stored:
        own = self._tensors[stored.name]
        return stored if stored.average is own else replace(stored, average=own)

    def _averaged(self, name: str) -> bool:
        # Counts and masks that nothing keeps stay the user's.
        return self._tensors[name].is_floating_point() or self._tensors[name].is_complex()

    def _unlike(self, stored: Stored) -> str:
        own = self._tensors[stored.name]
        if own.shape != stored.average.shape:
            return f"has shape {tuple(own.shape)} and not {tuple(stored.average.shape)}"
        if own.numel() > 1 and 0 in own.stride():
            return "has elements that share memory; clone it"
        averaged = stored.policy == "average"
        kinds = own.is_complex() == stored.average.is_complex() and (own.is_floating_point() or own.is_complex())
        return f"is {own.dtype}, which holds no average" if averaged and not kinds else ""

    def _model(self) -> Model:
        return as_model(self.given)

    def _look(self) -> tuple[ChangeDetector, int]:
        model = self._model()
        entries = walk(model)
        refuse_unfit(entries)
        # Aliases share the count of writes, by which others see that an average has moved.
        self._tensors = {}
        for entry in entries:
            self._tensors.update(dict.fromkeys(entry.aliases, entry.tensor.detach()))
        detector = ChangeDetector(model, [entry.tensor for entry in entries], [])
        return detector, detector.epoch
