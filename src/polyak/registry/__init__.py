"""Names to strategies: the built-ins and what plugins offer, all through one hook."""

from __future__ import annotations

import logging
import os
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from threading import RLock
from typing import TYPE_CHECKING

import pluggy

from polyak.errors import PluginError, UnknownStrategyError
from polyak.errors.formatting import brief, listed, shown
from polyak.errors.hints import strategy_habit
from polyak.registry import hookspecs
from polyak.registry.offers import Offer, Plugin, Strategies, checked, normal
from polyak.strategy import BUILT_IN

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from polyak.engine.averager import Averager
    from polyak.strategy.base import Strategy
    from polyak.strategy.clock import Clock

__all__ = ["Offer", "Plugin", "Registry", "Strategies", "registry", "strategies"]

_log = logging.getLogger("polyak")
_BUILT_IN = "polyak"
_SIMILAR = 0.6  # of two names; less is a guess
_LONGEST = 60  # letters of a name for which similar ones are looked up


_LOCK = RLock()
_LOADING: list[Registry] = []


class _BuiltIns:
    """The built-in strategies come through the same hook as everyone else's."""

    @hookspecs.hookimpl
    def polyak_strategies(self) -> list[type[Strategy]]:
        return [*BUILT_IN]


class Registry:
    """Owns the plugin manager; loads each plugin by itself, so that a broken one breaks nothing else.

    Args:
        points: The entry points of the group ``polyak``. Defaults to those that are installed.
        strict: Whether a plugin that fails raises at once. Defaults to ``POLYAK_STRICT_PLUGINS=1``.
        disabled: Names of entry points or distributions to skip. Defaults to ``POLYAK_DISABLE_PLUGINS=a,b``.

    Raises:
        PluginError: If a plugin failed and ``strict`` is set.
    """

    def __init__(
        self,
        points: list[EntryPoint] | None = None,
        *,
        strict: bool | None = None,
        disabled: frozenset[str] | None = None,
    ) -> None:
        self.manager = pluggy.PluginManager(hookspecs.GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        self._offers: list[Offer] = []
        self._added: dict[str, object] = {}
        self._strict = os.environ.get("POLYAK_STRICT_PLUGINS", "") not in {"", "0"} if strict is None else strict
        named = os.environ.get("POLYAK_DISABLE_PLUGINS", "").split(",")
        self._disabled = {normal(name) for name in (named if disabled is None else disabled)}
        self._admit(_BuiltIns(), _BUILT_IN)
        _LOADING.append(self)
        try:
            for point in entry_points(group=hookspecs.GROUP) if points is None else points:
                self._load(point)
        finally:
            _LOADING.remove(self)

    def register(self, plugin: object, distribution: str) -> None:
        """Add a plugin that is no entry point: in notebooks and tests.

        One that was added before under the same distribution is replaced, so that a cell can run again.

        Raises:
            PluginError: If ``plugin`` offers what is no strategy, or misspells a hook.
        """
        known, former = self._offers, self._added.get(distribution)
        if former is not None and former is not plugin:
            self.manager.unregister(former)
            self._offers = [offer for offer in known if offer.distribution != distribution]
        problem = self._admit(plugin, distribution)
        if problem:
            if former is not None and former is not plugin:
                self._offers = known
                self.manager.register(former, f"{distribution} ({id(former)})")
            message = f"the plugin {distribution!r} cannot be used: {problem}"
            raise PluginError(message)
        self._added[distribution] = plugin

    def _load(self, point: EntryPoint) -> None:
        distribution = point.dist.name if point.dist else point.name
        version = point.dist.version if point.dist else "?"
        plugin = Plugin(point.name, distribution, version, point.value)
        if {normal(point.name), normal(distribution)} & self._disabled:
            self.plugins.append(plugin._replace(error="disabled by POLYAK_DISABLE_PLUGINS"))
            return
        known = len(self._offers)
        try:
            problem = self._admit(point.load(), distribution)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - however a plugin fails, the host goes on
            problem = f"{type(error).__name__}: {error}"
        self.plugins.append(plugin._replace(error=problem, offers=tuple(o.name for o in self._offers[known:])))
        if problem:
            message = f"the plugin {point.name!r} of {distribution} {version} cannot be used: {problem}"
            if self._strict:
                raise PluginError(message)
            _log.warning(message)

    def _admit(self, plugin: object, distribution: str) -> str:
        """Register a plugin and collect its strategies; return what is wrong with it."""
        if self.manager.is_registered(plugin):
            return "another entry point has loaded it already"
        # A name of our own: pluggy would refuse two plugins whose classes are called the same.
        name = f"{distribution} ({id(plugin)})"
        try:
            self.manager.register(plugin, name)
            self.manager.check_pending()
            offers = self._offers_of(plugin, distribution)
        except Exception as error:  # noqa: BLE001 - as above
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            return _said(error)
        self._offers += offers
        return ""

    def _offers_of(self, plugin: object, distribution: str) -> list[Offer]:
        if not self.manager.get_hookcallers(plugin):
            message = "it implements no hook; mark its functions with @polyak.hookimpl"
            raise PluginError(message)
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        offers: list[Offer] = []
        for answer in self.manager.subset_hook_caller("polyak_strategies", others)():
            if not isinstance(answer, (list, tuple)):
                message = f"polyak_strategies() returned {answer!r}; expected a list of strategy classes"
                raise PluginError(message)
            offers += [checked(cls, distribution) for cls in answer]
        names = [o.name for o in (*self._offers, *offers) if o.distribution == distribution]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            message = f"{distribution} offers {', '.join(map(repr, twice))} more than once"
            raise PluginError(message)
        return offers

    def strategies(self) -> Strategies:
        """Return all names that can be chosen."""
        return Strategies({self._key(offer): offer for offer in self._offers})

    def called(self, strategy: Strategy) -> str:
        """Return the name by which a strategy's class is chosen; its own where nobody offers the class."""
        return next((self._key(offer) for offer in self._offers if offer.strategy is type(strategy)), strategy.name)

    def _key(self, offer: Offer) -> str:
        first, *others = self._offering(offer.name)
        alone = first is offer if first.distribution == _BUILT_IN else not others
        return offer.name if alone else f"{offer.distribution}:{offer.name}"

    def resolve(self, name: str) -> type[Strategy]:
        """Return the strategy class of a name, or of ``"dist:name"``.

        Raises:
            UnknownStrategyError: If no plugin offers the name, or two do.
        """
        distribution, colon, short = name.rpartition(":")
        wanted = normal(distribution)
        rivals = [o for o in self._offering(short) if not colon or normal(o.distribution) == wanted]
        if not rivals:
            raise UnknownStrategyError(self._unknown(name))
        if len(rivals) > 1 and rivals[0].distribution != _BUILT_IN:
            choices = " or ".join(repr(f"{o.distribution}:{o.name}") for o in rivals)
            message = f"the strategy {name!r} is offered by {len(rivals)} plugins; choose {choices}"
            raise UnknownStrategyError(message)
        return rivals[0].strategy

    def knows(self, name: str) -> bool:
        """Return whether somebody offers a name."""
        return bool(self._offering(name))

    def updated(self, averager: Averager, clock: Clock) -> None:
        """Tell the plugins that listen of an averaged update."""
        self.manager.hook.polyak_updated(averager=averager, clock=clock)

    @property
    def listens(self) -> bool:
        """Whether any plugin wants to hear of updates."""
        return bool(self.manager.hook.polyak_updated.get_hookimpls())

    def _offering(self, name: str) -> list[Offer]:
        # The built-ins were registered first, so they come first.
        return [offer for offer in self._offers if offer.name == name]

    def _unknown(self, name: str) -> str:
        known = list(self.strategies())
        forms = _forms(name) if len(name) <= _LONGEST else ()
        near = [match for form in forms for match in get_close_matches(form, known, 1, _SIMILAR)]
        hint = strategy_habit(name) or (f" Did you mean {near[0]!r}?" if near else "")
        failed = "".join(
            f"\n  plugin {p.name} ({p.distribution} {p.version}): {p.error}" for p in self.plugins if p.error
        )
        because = f"\nThese plugins are not there:{failed}" if failed else ""
        return brief(f"no strategy is called {shown(name)}.{hint} Known: {listed(known)}.{because}")


def _forms(name: str) -> tuple[str, ...]:
    return name, name.rpartition(":")[2], name.lower()


def _said(error: Exception) -> str:
    if isinstance(error, pluggy.PluginValidationError):
        hooks = ", ".join(name for name in hookspecs.__all__ if name.startswith("polyak_"))
        return f"{error}\nThe hooks are {hooks}."
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"


@cache
def shared_registry() -> Registry:
    """Return the registry of this process, made by the first call."""
    return Registry()


def registry() -> Registry:
    """Return the registry of this process; plugins are loaded at the first call, never at import.

    A plugin that asks for it while it is imported finds the built-in strategies and those of the plugins before it.
    """
    with _LOCK:
        return _LOADING[-1] if _LOADING else shared_registry()


def strategies() -> Strategies:
    """Return all strategies that can be chosen by name: a mapping of names to classes.

    Examples:
        >>> import polyak
        >>> list(polyak.strategies())[:3]
        ['ema', 'ema_debiased', 'ema_v1']
    """
    return registry().strategies()
