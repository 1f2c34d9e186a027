"""The engine's part that holds its settings: changed by ``configure`` only, recorded, and doubted."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from polyak.engine.settings import Settings, advice, configured
from polyak.engine.sources import many, writes
from polyak.engine.updates import Updating
from polyak.errors import AttributeAccessError
from polyak.errors.attributes import AttributeHints
from polyak.errors.calls import explained
from polyak.tensors.swap import in_force

if TYPE_CHECKING:
    from polyak.engine.plan.plan import Plan
    from polyak.strategy.base import Strategy

__all__ = ["Configurable"]

_OWN = frozenset({"options", "listeners", "openers", "pending", "guards", "warned", "built"})
"""The attributes without an underscore that only an instance has."""

_UPDATES, _SHARE = 100, 0.5
"""From so many updates on, an average with a larger share of the start is warned of."""


class Configurable(AttributeHints, Updating):
    """An averager whose settings can change in the middle of a run."""

    @property
    @override
    def strategy(self) -> Strategy:
        return self._strategy

    @override
    @explained("Settings are given by name: averager.configure(decay=0.5)")
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
            read_only = fixed and name != "strategy"
            reason = "it can only be read" if read_only else advice(self._settings, name)
            message = f"the averager's {name!r} cannot be set; {reason}"
            raise AttributeAccessError(message)
        super().__setattr__(name, value)

    @override
    def _hint(self, name: str) -> str:
        if name in type(vars(self).get("_strategy")).__dict__.get("__pydantic_fields__", ()):
            return f" For that there is averager.strategy.{name}."
        return super()._hint(name)

    def _evaluated(self, level: int = 4) -> Plan:
        """Return the plan for reading the average; warn once where it is hardly one."""
        plan = self._current()
        progress = self._state.progress
        # While an average is in a model, its parameters' counts of writes are numbers of the swap.
        counted = bool(progress.calls) or bool(in_force)
        if not counted and self._sources is not None and (name := self._sources.idle()):
            message = (
                f"the averager is attached to {name}, whose step() has never run though its parameters were changed "
                "many times: nothing was averaged. Attach to the optimiser that steps, or call averager.update()."
            )
            self.warn("idle", message, level)
        elif not counted and not self.options.capturable and self._trained(plan):
            message = (
                "the average has never been updated although the weights have changed; call averager.update() after "
                "each optimizer.step()"
            )
            self.warn("never", message, level)
        if progress.n >= _UPDATES and "start" not in self.warned:
            self._doubt_start(progress.n, level + 1)
        return plan

    def _trained(self, plan: Plan) -> bool:
        """Return whether a parameter was written to many times since the averager was built."""
        built, now = self.built, writes(plan.live)
        if built is None or now is None or len(built) != len(now):
            return False
        parameters = [s.kind == "parameter" for s in plan.stored]
        return many([*compress(built, parameters)], [*compress(now, parameters)])

    def _doubt_start(self, n: int, level: int) -> None:
        several = bool(self._strategy.slots())
        share = abs(self.profile().start) if several else self._state.history.start
        if share > _SHARE:
            message = (
                f"after {n} updates the average is still {share:.0%} the weights that it started from; the strategy "
                "'ema_debiased' and origin='first' replace them by the first update, and a smaller decay forgets them"
            )
            self.warn("start", message, level)
        self.warned.add("start")  # the share of the start only falls
