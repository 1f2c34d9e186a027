"""Who updates an averager: several optimisers make one update together; steps that count twice are warned of."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak.engine.writes import many, writes
from polyak.errors.calls import warn_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

__all__ = ["Source", "Sources"]

_BY_HAND = "averager.update()"
_TURNS = 3
_STEADY = 2


class Source:
    """An optimiser that updates an averager.

    Args:
        optimizer: The optimiser.
        name: The optimiser's name in warnings.

    Attributes:
        missed: How many rounds in a row the others stepped without it.
        lr: The learning rate of its last step.
        place: Its place in the last round in which all optimisers stepped.
    """

    def __init__(self, optimizer: Optimizer, name: str) -> None:
        self.name = name
        self.missed = 0
        self.lr: float | None = None
        self.place = 0
        self._optimizer = weakref.ref(optimizer)
        self._params = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._attached = self.versions()

    def replaces(self, other: Source) -> bool:
        """Return whether it trains parameters that another one has trained."""
        return not self._params.isdisjoint(other._params)

    def versions(self) -> list[int] | None:
        """Return how often each parameter was written to in place, or None where that is unknown."""
        optimizer = self._optimizer()
        if optimizer is None:
            return None
        return writes(param for group in optimizer.param_groups for param in group["params"])

    def trained(self) -> bool:
        """Return whether the parameters were written to so often that it stepped many times since it was attached."""
        return many(self._attached, self.versions())


class Sources:
    """Joins the steps of several optimisers to one update, and warns once where training steps are counted twice.

    Optimisers of different parameters make one update per round, behind the last one's step. A round ends without
    those that do not step in it: before another one's next step. The next round does not wait for them.
    Where rounds had the same order so far, a step that goes back in it begins the next round, and one round without
    an optimiser is an exception: the next one waits for it.

    - A call of ``update()`` right behind the update of an attached optimiser is left out, unless the weights were
      written to in between (as their version counters say: writing through ``.data`` goes unnoticed).
    - Optimisers and calls that update in turns, one update each, are counted and warned of.

    An optimiser that took another one's place, or single calls between many steps are no turns.
    """

    def __init__(self) -> None:
        self._attached: list[weakref.ref[Source]] = []
        self._updating = False
        self._last: Source | None = None
        self._versions: list[int] | None = None
        self._turns: list[Source | None] = []
        self._warned: set[str] = set()
        self._stepped: list[Source] = []
        self._moved = False
        self._ordered = 0

    def attach(self, optimizer: Optimizer, name: str) -> Source:
        """Register an optimiser that updates the averager from now on."""
        source = Source(optimizer, name)
        self._attached = [other for other in self._attached if other() is not None]
        self._attached.append(weakref.ref(source))
        return source

    def forget(self) -> None:
        """Forget the updates so far: a state was loaded."""
        self._last, self._versions, self._turns = None, None, []
        self._stepped.clear()

    @property
    def lr(self) -> float | None:
        """The learning rate of the round: that of the optimiser that was attached first."""
        return next((source.lr for source in self._present() if source in self._stepped), None)

    def alone(self, source: Source) -> bool:
        """Return whether no other optimiser makes an update together with this one."""
        return all(other is source or source.replaces(other) for other in self._present())

    def overdue(self, source: Source) -> bool:
        """Return whether an update is due before the next step of an optimiser: it begins the next round."""
        goes_back = self._steady and any(other.place > source.place for other in self._stepped)
        if source not in self._stepped and not goes_back:
            return False
        for other in self._present():
            if other not in self._stepped:
                other.missed += 1
        return self._moved

    def stepped(self, source: Source, lr: float | None, *, moved: bool) -> bool:
        """Return whether an update is due now that an optimiser has stepped.

        Args:
            source: The optimiser.
            lr: Its learning rate.
            moved: Whether its step was made; a ``GradScaler`` may have left it out.
        """
        source.lr, self._moved = lr, moved or (self._moved and bool(self._stepped))
        self._stepped.append(source)
        waits = any(
            other not in self._stepped and other.missed <= int(self._steady) and not source.replaces(other)
            for other in self._present()
        )
        if not waits and not self._moved:
            self._stepped.clear()
        return self._moved and not waits

    def _present(self) -> list[Source]:
        return [source for ref in self._attached if (source := ref()) is not None]

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Return a context in which an update is made by an optimiser and not by hand."""
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def leave_out(self, is_own: Callable[[], bool]) -> bool:
        """Return whether a call of ``update()`` comes second for the weights that an optimiser's update took.

        Args:
            is_own: Whether the call is for the model that the optimisers train.
        """
        if self._updating or not (self._attached and is_own()):
            return False
        if self._last is not None and self._versions is not None and self._versions == self._last.versions():
            message = (
                f"{self._last.name} already updated this averager in its step, so this {_BY_HAND} was ignored. "
                f"Call {_BY_HAND} yourself or let the optimiser do it, not both."
            )
            self._warn("repeated", message)
            return True
        self.note(None)
        return False

    def note(self, source: Source | None) -> None:
        """Note an update by an optimiser, or by hand."""
        turns = self._turns
        # Optimisers of different parameters share the rounds, whichever of them ends one.
        if turns and (source is turns[-1] or (source and turns[-1] and not source.replaces(turns[-1]))):
            turns.clear()
        elif len(turns) >= _TURNS and source in turns:
            first, second = (_BY_HAND if one is None else one.name for one in (turns[-1], source))
            message = (
                f"the averager is updated in turns by {first} and by {'another ' * (first == second)}{second}: each "
                "training step counts more than once. Update by one of them only."
            )
            self._warn("turns", message)
            turns.clear()
        turns.append(source)
        self._end_round()
        self._last, self._versions = source, None if source is None else source.versions()

    @property
    def _steady(self) -> bool:
        return self._ordered >= _STEADY

    def _end_round(self) -> None:
        if len(self._stepped) == len(self._attached):
            places = [other.place for other in self._stepped]
            self._ordered = self._ordered + 1 if places == sorted(places) else 0
            for place, other in enumerate(self._stepped):
                other.place = place
        for other in self._stepped:
            other.missed = 0
        self._stepped.clear()

    def idle(self) -> str:
        """Return the name of an attached optimiser whose ``step()`` never runs though it trains, or ""."""
        return next((source.name for source in self._present() if source.trained()), "")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn_user(message)
