"""Settings in the middle of a run: changed, and compared with those of a state that is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from polyak.engine.history import Change
from polyak.engine.options import Options
from polyak.errors import ConfigError, StateError
from polyak.errors.formatting import brief, shown
from polyak.strategy.base import settings_of, variant
from polyak.strategy.frozen import line, nearest
from polyak.strategy.missing import MissingStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polyak.engine.schema import SavedState
    from polyak.strategy.base import Strategy

__all__ = ["Settings", "advice", "configured", "resumed"]

CONFIGURABLE = ("start", "every", "nonfinite")
"""The engine options that may change in the middle of a run; the others decide which tensors there are."""

_COUNTED = ("start", "every", "origin", "buffers")
"""The engine options that change what an average means."""

_PROBES = (1, 2, 3, 10, 1000)


class Settings(NamedTuple):
    """A strategy, the engine's options, and what was changed since they were built."""

    strategy: Strategy
    options: Options
    changes: tuple[Change, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return each setting by its name, as plain types."""
        return {**self.options.model_dump(mode="json"), **settings_of(self.strategy)}

    def built(self) -> dict[str, Any]:
        """Return each setting as it was when the averager was built."""
        return _before(self.values(), self.changes)

    def replaced(self, new: Mapping[str, Any]) -> Settings:
        """Return these settings with others in their places.

        Raises:
            ConfigError: If one has a wrong value.
        """
        mine = {name: getattr(self.strategy, name) for name in self.strategy.model_fields_set}
        own = {name: value for name, value in new.items() if name in type(self.strategy).model_fields}
        rest = {name: value for name, value in new.items() if name not in own}
        try:
            strategy = type(self.strategy).model_validate({**mine, **own}) if own else self.strategy
            options = Options.model_validate({**self.options.model_dump(), **rest}) if rest else self.options
        except ValidationError as error:
            lines = "\n".join(f"  {line(detail, str)}" for detail in error.errors())
            message = f"the settings cannot be used:\n{lines}"
            raise ConfigError(message) from error
        return self._replace(strategy=strategy, options=options)


def configured(old: Settings, n: int, new: Mapping[str, Any]) -> Settings:
    """Return the settings with some of them changed after ``n`` updates.

    Raises:
        ConfigError: If there is no such setting, its value is wrong, or it cannot change in the middle of a run.
    """
    for name in new:
        _refuse_fixed(old, name)
    made = old.replaced(new)
    if made.strategy.engine() != old.strategy.engine():
        message = f"{_shown(new)} decides how tensors are kept, which is fixed when an averager is built; {_ANEW}"
        raise ConfigError(message)
    if _means_otherwise(old.strategy, made.strategy):
        message = (
            f"the strategy {old.strategy.name!r} keeps several tensors, and {_shown(new)} changes how many or how "
            f"they move; what was averaged so far would count otherwise. {_ANEW.capitalize()}."
        )
        raise ConfigError(message)
    before, after = old.values(), made.values()
    changes = tuple(Change(n, name, before[name], after[name]) for name in after if before[name] != after[name])
    return made._replace(changes=(*old.changes, *changes))


_ANEW = "build a new averager with it"


def _refuse_fixed(old: Settings, name: str) -> None:
    if isinstance(old.strategy, MissingStrategy):
        message = f"{name}: the strategy {old.strategy.name!r} is not installed here; install the plugin that offers it"
        raise ConfigError(message)
    own = [field for field in type(old.strategy).model_fields if field != "name"]
    if name in {"name", "strategy"}:
        message = f"{name}: an averager keeps its strategy, {old.strategy.name!r}; build a new one for another strategy"
        raise ConfigError(message)
    if name in Options.model_fields and name not in CONFIGURABLE:
        message = (
            f"{name}: fixed when an averager is built; build a new one, and load_state_dict() the state of this one"
        )
        raise ConfigError(message)
    if name in CONFIGURABLE and old.options.capturable:
        message = f"{name}: capturable=True fixes it, since a graph was captured with it; build a new averager"
        raise ConfigError(message)
    if name not in {*own, *CONFIGURABLE}:
        known = [*own, *CONFIGURABLE]
        message = f"{name}: there is no such setting.{nearest(name, known)} Known: {', '.join(known)}"
        raise ConfigError(message)


def _means_otherwise(old: Strategy, new: Strategy) -> bool:
    """Return whether a strategy's updates so far would count otherwise under new settings."""
    if not old.slots() and not new.slots():
        return False  # rates are recorded, and they are all there is
    rates = np.array([1.0, 0.5, 0.25, 0.125])
    return (
        old.slots() != new.slots()
        or any(tuple(old.moves(n, rate)) != tuple(new.moves(n, rate)) for n in _PROBES for rate in rates.tolist())
        or not np.array_equal(old.shares(rates).updates, new.shares(rates).updates)
    )


def resumed(state: SavedState, own: Settings, knows: Callable[[str], bool]) -> tuple[Settings, list[str]]:
    """Return the settings that go on from a state, and in words which of them are not the saved ones.

    If the averager was built with the original settings, changes made later by ``configure()`` are restored. A setting
    that was built otherwise keeps the averager's own value. Where ``nonfinite`` was left at its default, that of the
    state goes on.

    Args:
        state: The state.
        own: The averager's own settings.
        knows: Tells whether a strategy's name can be resolved here. A strategy that is not installed is replaced by
            one that only refuses to update.

    Raises:
        StateError: If the state was made by another strategy, or its settings fit no more.
    """
    saved, changes = state.strategy, state.history.changes
    name = saved["name"]
    if name != own.strategy.name and not knows(name):
        return own._replace(strategy=MissingStrategy.of(saved, state.slots), changes=changes), []
    if name != own.strategy.name:
        message = (
            f"the state was made by the strategy {shown(name)}, and this averager uses {own.strategy.name!r}; "
            f"build it with strategy={shown(name)} to go on, or start a new average"
        )
        raise StateError(message)
    theirs, mine = {**state.config, **saved}, own.values()
    built, theirs_built = own.built(), _before(theirs, changes)
    alike = {key for key in mine if key in theirs and built[key] == theirs_built[key]}
    if built["nonfinite"] == Options().nonfinite and "nonfinite" in theirs:
        alike.add("nonfinite")
    taken = {key: theirs[key] for key in alike if theirs[key] != mine[key] and key in _changing(own)}
    try:
        settings = own.replaced(taken)
    except ConfigError as error:
        message = f"the settings that the state was saved with do not go with those of this averager: {error}"
        raise StateError(brief(message)) from error
    kept = tuple(change for change in changes if change.name in alike)
    since = (Change(0, key, built[key], mine[key]) for key in mine if key not in alike and built[key] != mine[key])
    counted = {*_COUNTED, *type(own.strategy).model_fields}
    kinds = [kind or own.strategy.name for kind in (variant(own.strategy), state.variant)]
    words = [f"the class {kinds[0]} (saved: {shown(kinds[1])})"] if kinds[0] != kinds[1] else []
    words += [
        f"{key}={mine[key]!r} (saved: {shown(theirs[key])})"
        for key in mine
        if key in counted and key in theirs and key not in alike and theirs[key] != mine[key]
    ]
    # A plugin of another version may have renamed a setting.
    fields = type(own.strategy).model_fields
    words += [f"no {shown(key)} (saved: {shown(value)})" for key, value in saved.items() if key not in fields]
    words += [f"{key}={mine[key]!r} (not saved)" for key in fields if key not in saved]
    return settings._replace(changes=(*since, *kept)), words


def _changing(own: Settings) -> set[str]:
    return {*CONFIGURABLE, *type(own.strategy).model_fields} - {"name"}


def _before(values: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    return {**values, **{change.name: change.before for change in reversed(changes)}}


def advice(settings: Settings, name: str) -> str:
    """Return in words what to do in the place of setting an attribute of an averager."""
    if name == "strategy":
        return "an averager keeps its strategy; build a new one for another strategy"
    if name in _changing(settings):
        return f"call averager.configure({name}=...), which records the change"
    if name in type(settings.strategy).model_fields or name in Options.model_fields:
        return "it is fixed when an averager is built; build a new one"
    return f"its settings are changed by averager.configure(...).{nearest(name, sorted(_changing(settings)))}"


def _shown(new: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in new.items())
