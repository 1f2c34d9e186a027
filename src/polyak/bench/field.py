"""All averages of one model side by side, seen to compute the same before anything is timed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from polyak.bench.entrants import start
from polyak.errors import PolyakWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from polyak.bench.entrants import Entrant

__all__ = ["Field", "distinct", "moved_bytes", "shake"]

_SAME = 1e-4
_RESOLUTION = {torch.bfloat16: 0.03, torch.float16: 4e-3}
"""How far a short average may be off after a few updates that are rounded at random."""
_UPDATES = 3
_WARM = 9  # updates, in which kernel="auto" has tried and chosen


class Field:
    """One average of a model for each entrant.

    Attributes:
        updates: One update of each entrant that runs here and computes the average, by name.
        absent: Why the others do not take part, by name.
        remarks: What is to be said of one that takes part, by name.
    """

    def __init__(self, model: nn.Module, entrants: Sequence[Entrant], dtype: torch.dtype | None = None) -> None:
        self.model, self.entrants, self._dtype = model, list(entrants), dtype
        self.updates: dict[str, Callable[[], object]] = {}
        self.absent: dict[str, str] = {}
        self.remarks: dict[str, str] = {}
        self.averages: dict[str, Any] = {}
        for entrant in self.entrants:
            self._try(entrant, self._enter)

    def warm_up(self) -> None:
        """Make the updates of all that caches, compilers and the choice of kernels need."""
        for _ in range(_WARM):
            self._update_all()

    def check(self) -> None:
        """Make a few updates on changing weights, and drop the entrants that do not compute the average.

        The first is on the weights that all were made from, so that it does not matter who starts from which. The
        reference is polyak's plain loop, at least in float32.
        """
        references = self._references()
        for number in range(_UPDATES):
            if number:
                shake(self.model)
            self._update_all()
            for strategy, reference in references.items():
                reference.update(**({} if strategy == "ema" else {"lr": 0.1}))
        for entrant in [entrant for entrant in self.entrants if entrant.name in self.updates]:
            self._compare(entrant, references[entrant.strategy].averages)
        self.warm_up()

    def unmoved(self, name: str) -> Callable[[], bool]:
        """Return a function that checks whether an entrant's averaged parameters are unchanged."""
        names = [key for key, _ in self.model.named_parameters()]
        now = self._read(name)
        before = {key: now[key].detach().clone() for key in names}

        def same() -> bool:
            after = self._read(name)
            return all(after[key].equal(value) for key, value in before.items())

        return same

    def _references(self) -> dict[str, Any]:
        dtype = None if self._dtype in _RESOLUTION else self._dtype
        strategies = {entrant.strategy for entrant in self.entrants if entrant.name in self.updates}
        return {
            name: start(self.model, name, dtype, kernel="loop", nonfinite="propagate") for name in sorted(strategies)
        }

    def _read(self, name: str) -> Mapping[str, Tensor]:
        (entrant,) = (entrant for entrant in self.entrants if entrant.name == name)
        return entrant.averages(self.averages[name], self.model)

    def _enter(self, entrant: Entrant) -> None:
        average = self.averages[entrant.name] = entrant.make(self.model, self._dtype)
        self.updates[entrant.name] = lambda: entrant.update(average, self.model)

    def _update_all(self) -> None:
        for entrant in self.entrants:
            if entrant.name in self.updates:
                self._try(entrant, lambda entrant: self.updates[entrant.name]())

    def _try(self, entrant: Entrant, what: Callable[[Entrant], object]) -> None:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                what(entrant)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a library does, the others continue
            self._leave_out(entrant.name, f"{type(error).__name__}: {' '.join(str(error).split())}")
        else:
            ours = [" ".join(str(one.message).split()) for one in said if issubclass(one.category, PolyakWarning)]
            self.remarks.update({entrant.name: ours[0]} if ours else {})

    def _leave_out(self, name: str, reason: str) -> None:
        self.absent[name] = reason
        self.updates.pop(name, None)
        self.averages.pop(name, None)

    def _compare(self, entrant: Entrant, reference: Mapping[str, Tensor]) -> None:
        theirs = self._read(entrant.name)
        names = [name for name, _ in self.model.named_parameters()] if not entrant.buffers else list(reference)
        floats = [name for name in names if reference[name].is_floating_point()]
        missing = [name for name in floats if name not in theirs]
        far = {name: _distance(theirs[name], reference[name]) for name in floats if name not in missing}
        allowed = max([_SAME, *(_RESOLUTION.get(theirs[name].dtype, 0.0) for name in far)])
        off = {name: distance for name, distance in far.items() if not distance <= allowed}
        if missing or off:
            if not missing and {*off} <= _tied(self.model):
                self.remarks[entrant.name] = "moves tied weights twice"
                return
            worst = f"off by {max(off.values()):.0e}" if off else f"without {missing[0]}"
            self._leave_out(entrant.name, f"does not compute the average ({worst}), so it is not timed")


def distinct(model: nn.Module) -> list[Tensor]:
    """Return each floating tensor of a model once."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def moved_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of one update: each weight is read, its average is read and written."""
    total = 0
    for tensor in distinct(model):
        stored = dtype or (torch.float32 if tensor.dtype in _RESOLUTION else tensor.dtype)
        total += tensor.numel() * (tensor.dtype.itemsize + 2 * stored.itemsize)
    return total


def shake(model: nn.Module) -> None:
    """Move every floating tensor of a model by noise, far enough that its average must be seen to follow."""
    with torch.no_grad():
        for tensor in distinct(model):
            tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5))


def _distance(ours: Tensor, reference: Tensor) -> float:
    wide = torch.promote_types(ours.dtype, reference.dtype)
    largest = float(reference.detach().abs().max()) if reference.numel() else 0.0
    apart = float((ours.detach().to(wide) - reference.detach().to(wide)).abs().max()) if ours.numel() else 0.0
    return apart / max(largest, 1e-30)


def _tied(model: nn.Module) -> set[str]:
    every = list(model.named_parameters(remove_duplicate=False))
    seen: dict[int, list[str]] = {}
    for name, tensor in every:
        seen.setdefault(id(tensor), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}
