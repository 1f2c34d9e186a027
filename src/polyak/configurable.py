"""The engine's part that holds its settings: changed by ``configure`` only, and recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from polyak.attributes import AttributeHints
from polyak.errors import AttributeAccessError
from polyak.settings import Settings, advice, configured
from polyak.updating import Updating

if TYPE_CHECKING:
    from polyak.strategy import Strategy

__all__ = ["Configurable"]

_OWN = frozenset({"options", "listeners"})
"""The attributes without an underscore that only an instance has."""


class Configurable(AttributeHints, Updating):
    """An averager whose settings can change in the middle of a run."""

    @property
    @override
    def strategy(self) -> Strategy:
        return self._strategy

    @override
    def configure(self, **settings: Any) -> None:
        made = configured(self._settings, self._state.progress.n, settings)
        self._binding.follow(made.options)
        try:
            self._settings = made
        except BaseException:  # Ctrl-C between its parts: all of it or nothing
            self._settings = made
            raise

    @property
    def _settings(self) -> Settings:
        return Settings(self._strategy, self.options, self._state.history.changes)

    @_settings.setter
    def _settings(self, settings: Settings) -> None:
        self._strategy, self.options, self._state.history.changes = settings
        self._binding.follow(settings.options)

    @override
    def __setattr__(self, name: str, value: object) -> None:
        known = getattr(type(self), name, None)
        fixed = isinstance(known, property) and known.fset is None
        if fixed or not (known is not None or name.startswith("_") or name in _OWN):
            message = f"the averager's {name!r} cannot be set; {advice(self._settings, name)}"
            raise AttributeAccessError(message)
        super().__setattr__(name, value)
