"""Names to strategies and merges: the built-ins and what plugins offer, all through one hook."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.metadata import entry_points
from threading import RLock
from typing import TYPE_CHECKING, Any

import pluggy

from polyak.errors import PluginError, UnknownMergeError, UnknownStrategyError
from polyak.errors.hints import strategy_habit
from polyak.merges import BUILT_IN as MERGES, Merge
from polyak.registry import hookspecs
from polyak.registry.catalog import BUILT_IN, Catalog, Kind
from polyak.registry.offers import Merges, Offer, Plugin, Strategies, normal
from polyak.strategy import BUILT_IN as STRATEGIES
from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from polyak.engine.averager import Averager
    from polyak.strategy.clock import Clock

__all__ = ["Merges", "Offer", "Plugin", "Registry", "Strategies", "registry", "strategies"]

_log = logging.getLogger("polyak")


_LOCK = RLock()
_LOADING: list[Registry] = []


class _BuiltIns:
    """The built-in classes come through the same hooks as everyone else's."""

    @hookspecs.hookimpl
    def polyak_strategies(self) -> list[type[Strategy]]:
        return [*STRATEGIES]

    @hookspecs.hookimpl
    def polyak_merges(self) -> list[type[Merge]]:
        return [*MERGES]


_STRATEGIES: Kind[Strategy] = Kind(
    "strategy", "polyak_strategies", Strategy, "polyak.Strategy that define rate()", UnknownStrategyError,
    strategy_habit,
)  # fmt: skip
_MERGES: Kind[Merge] = Kind(
    "merge", "polyak_merges", Merge, "polyak.files.Merge that define merge()", UnknownMergeError, lambda _: ""
)


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
        self._strategies, self._merges = Catalog(_STRATEGIES), Catalog(_MERGES)
        self._catalogs: tuple[Catalog[Any], ...] = (self._strategies, self._merges)
        self._added: dict[str, object] = {}
        self._strict = os.environ.get("POLYAK_STRICT_PLUGINS", "") not in {"", "0"} if strict is None else strict
        named = os.environ.get("POLYAK_DISABLE_PLUGINS", "").split(",")
        self._disabled = {normal(name) for name in (named if disabled is None else disabled)}
        self._admit(_BuiltIns(), BUILT_IN)
        _LOADING.append(self)
        try:
            for point in entry_points(group=hookspecs.GROUP) if points is None else points:
                self._load(point)
        finally:
            _LOADING.remove(self)

    def register(self, plugin: object, distribution: str) -> None:
        """Add a plugin without an entry point: in notebooks and tests.

        One that was added before under the same distribution is replaced, so that a cell can run again.

        Raises:
            PluginError: If ``plugin`` offers something other than strategies and merges, or misspells a hook.
        """
        known, former = [catalog.offers for catalog in self._catalogs], self._added.get(distribution)
        if former is not None and former is not plugin:
            self.manager.unregister(former)
            for catalog in self._catalogs:
                catalog.offers = [offer for offer in catalog.offers if offer.distribution != distribution]
        problem = self._admit(plugin, distribution)
        if problem:
            if former is not None and former is not plugin:
                for catalog, offers in zip(self._catalogs, known, strict=True):
                    catalog.offers = offers
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
        known = [len(catalog.offers) for catalog in self._catalogs]
        try:
            problem = self._admit(point.load(), distribution)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - however a plugin fails, the program continues
            problem = f"{type(error).__name__}: {error}"
        pairs = zip(self._catalogs, known, strict=True)
        offers = tuple(offer.name for catalog, before in pairs for offer in catalog.offers[before:])
        self.plugins.append(plugin._replace(error=problem, offers=offers))
        if problem:
            message = f"the plugin {point.name!r} of {distribution} {version} cannot be used: {problem}"
            if self._strict:
                raise PluginError(message)
            _log.warning(message)

    def _admit(self, plugin: object, distribution: str) -> str:
        """Register a plugin and collect what it offers; return what is wrong with it."""
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
        for catalog, own in zip(self._catalogs, offers, strict=True):
            catalog.offers = [*catalog.offers, *own]
        return ""

    def _offers_of(self, plugin: object, distribution: str) -> list[list[Offer[Any]]]:
        if not self.manager.get_hookcallers(plugin):
            message = "it implements no hook; mark its functions with @polyak.hookimpl"
            raise PluginError(message)
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        return [
            catalog.answered(self.manager.subset_hook_caller(catalog.kind.hook, others)(), distribution)
            for catalog in self._catalogs
        ]

    def strategies(self) -> Strategies:
        """Return all names of strategies that can be chosen."""
        return Strategies(self._strategies.named())

    def merges(self) -> Merges:
        """Return all names of merges that can be chosen."""
        return Merges(self._merges.named())

    def called(self, strategy: Strategy) -> str:
        """Return the name by which a strategy's class is chosen; its own name where no one offers the class."""
        known = (offer for offer in self._strategies.offers if offer.cls is type(strategy))
        return next(map(self._strategies.key, known), strategy.name)

    def resolve(self, name: str) -> type[Strategy]:
        """Return the strategy class of a name, or of ``"dist:name"``.

        Raises:
            UnknownStrategyError: If no plugin offers the name, or two do.
        """
        return self._strategies.resolve(name, self.plugins)

    def resolve_merge(self, name: str) -> type[Merge]:
        """Return the merge class of a name, or of ``"dist:name"``.

        Raises:
            UnknownMergeError: If no plugin offers the name, or two do.
        """
        return self._merges.resolve(name, self.plugins)

    def knows(self, name: str) -> bool:
        """Return whether somebody offers a strategy of a name."""
        return bool(self._strategies.of(name))

    def updated(self, averager: Averager, clock: Clock) -> None:
        """Tell the plugins that listen of an averaged update."""
        self.manager.hook.polyak_updated(averager=averager, clock=clock)

    @property
    def listens(self) -> bool:
        """Whether any plugin wants to hear of updates."""
        return bool(self.manager.hook.polyak_updated.get_hookimpls())


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

    A plugin that asks for it while it is imported finds the built-in strategies and those that earlier plugins offer.
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
