"""An averager's module, made when it is first asked for and kept in step with the average."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from weakref import WeakMethod, WeakSet

from polyak.engine.averaged_module.copies import foreign_hooks
from polyak.engine.averaged_module.module import AveragedModule
from polyak.tensors.swap import in_force

if TYPE_CHECKING:
    from torch import nn

    from polyak.engine.core import Core
    from polyak.engine.plan.plan import Plan

__all__ = ["View"]

_with_modules: WeakSet[View] = WeakSet()


class View:
    """A module that computes with the average, apart from the model."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._averaged: AveragedModule | None = None

    def module(self, plan: Plan) -> nn.Module:
        """Return the module, which computes with the average as it is now.

        Args:
            plan: The plan of the averager's own model.
        """
        if self._averaged is None or not self._averaged.fits(plan):
            self._averaged = AveragedModule(plan, WeakMethod(self.refresh))
            self._averaged.is_held()  # counts the references that are its own
            self.core.binding.handed_out.add(self._averaged.root)
            _with_modules.add(self)
            self._warn_of_hooks(cast("nn.Module", plan.model))
        self.refresh()
        return self._averaged.root

    def refresh(self) -> None:
        """Let the module compute with the average as it is now."""
        if self._averaged is None:
            return
        core = self.core
        # What origin="first" gives before the first update, and what a graph does, is not counted.
        n, stored = core.state.progress.n, core.state.stored
        counted = (n or core.options.origin != "first") and not core.options.capturable
        written = sum(s.average._version for s in stored)  # noqa: SLF001 - torch has no other count of writes
        moment = (id(stored), n, written, *in_force) if counted else None
        self._averaged.follow(core.averages, moment)

    def forget(self) -> None:
        """Refresh the module at the next look, whatever moment it is: a state was loaded."""
        if self._averaged is not None:
            self._averaged.moment = None

    @property
    def is_held(self) -> bool:
        """Whether anyone holds the module, by whatever method and at any time."""
        return self._averaged is not None and self._averaged.is_held()

    def keep_in_step(self) -> None:
        """Refresh a module that anyone holds."""
        if self.is_held:
            self.refresh()

    def swapped(self) -> None:
        """Refresh the modules whose averages may be held elsewhere since this one's was put in or taken out."""
        for other in [*_with_modules]:
            if other is self or other.core.binding.depth:
                other.keep_in_step()

    def _warn_of_hooks(self, model: nn.Module) -> None:
        if hooks := foreign_hooks(model):
            message = (
                "forward hooks that the model's own classes did not make are not on averager.module: "
                f"{', '.join(hooks[:5])}; register those that compute on averager.module too"
            )
            self.core.warn("hooks", message)
