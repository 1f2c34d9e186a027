"""The engine's part that computes with the average apart from the model: ``averager.module`` and ``averager(x)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast
from weakref import WeakMethod, WeakSet

from typing_extensions import override

from polyak.engine.averaged_module.copies import foreign_hooks
from polyak.engine.averaged_module.module import AveragedModule
from polyak.engine.configurable import Configurable
from polyak.tensors.swap import in_force

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Computing"]


_with_modules: WeakSet[Computing] = WeakSet()


class Computing(Configurable):
    """An averager with a module that computes with the average."""

    _averaged: AveragedModule | None = None

    @property
    @override
    def module(self) -> nn.Module:
        plan = self._evaluated()
        if self._averaged is None or not self._averaged.fits(plan):
            self._averaged = AveragedModule(plan, WeakMethod(self.refresh))
            self._averaged.is_held()  # counts the references that are its own
            self._binding.handed_out.add(self._averaged.root)
            _with_modules.add(self)
            self._warn_of_hooks(cast("nn.Module", plan.model))
        self.refresh()
        return self._averaged.root

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated()
        return self.module(*args, **kwargs)

    def refresh(self) -> None:
        """Let the module compute with the average as it is now."""
        if self._averaged is None:
            return
        # What origin="first" gives before the first update, and what a graph does, is not counted.
        counted = (self.n or self.options.origin != "first") and not self.options.capturable
        stored = self._state.stored
        written = sum(s.average._version for s in stored)  # noqa: SLF001 - torch has no other count of writes
        moment = (id(stored), self.n, written, *in_force) if counted else None
        self._averaged.follow(lambda: self.averages, moment)

    @property
    @override
    def is_followed(self) -> bool:
        return self._averaged is not None and self._averaged.is_held()

    @override
    def keep_in_step(self) -> None:
        if self.is_followed:
            self.refresh()

    def swapped(self) -> None:
        """Refresh the modules whose averages may be held elsewhere since this one's was put in or taken out."""
        for other in [*_with_modules]:
            if other is self or other.is_applied:
                other.keep_in_step()

    def _warn_of_hooks(self, model: nn.Module) -> None:
        if hooks := foreign_hooks(model):
            message = (
                "forward hooks that the model's own classes did not make are not on averager.module: "
                f"{', '.join(hooks[:5])}; register those that compute on averager.module too"
            )
            self.warn("hooks", message, level=5)
