"""What plugins offer, and what became of each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from inspect import isabstract
from typing import NamedTuple

from polyak.errors import PluginError, UnknownStrategyError
from polyak.errors.formatting import listed, shown
from polyak.strategy.base import Strategy

__all__ = ["Offer", "Plugin", "Strategies", "checked", "normal"]


class Offer(NamedTuple):
    """One strategy class and the distribution that offers it."""

    name: str
    strategy: type[Strategy]
    distribution: str


class Plugin(NamedTuple):
    """What became of one entry point: ``error`` is empty where it loaded, and ``offers`` names its strategies."""

    name: str
    distribution: str
    version: str
    target: str
    error: str = ""
    offers: tuple[str, ...] = ()


class Strategies(Mapping[str, type[Strategy]]):
    """All names that can be chosen, with their classes.

    A name that two plugins offer is listed as ``"dist:name"`` for each of them.

    Examples:
        >>> import polyak
        >>> polyak.strategies()["swa"], polyak.strategies().distribution("swa")
        (<class 'polyak.strategy.swa.SWA'>, 'polyak')
    """

    def __init__(self, offers: Mapping[str, Offer]) -> None:
        self._offers = dict(offers)

    def __getitem__(self, name: str) -> type[Strategy]:
        return self._offer(name).strategy

    def __iter__(self) -> Iterator[str]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def __repr__(self) -> str:
        return f"<strategies: {', '.join(f'{name} ({offer.distribution})' for name, offer in self._offers.items())}>"

    def distribution(self, name: str) -> str:
        """Return the distribution that offers a name."""
        return self._offer(name).distribution

    def _offer(self, name: str) -> Offer:
        if name not in self._offers:
            message = f"no strategy is called {shown(name)}. Known: {listed(self._offers)}"
            raise UnknownStrategyError(message)
        return self._offers[name]


def normal(name: str) -> str:
    """Return the name of a distribution or entry point as packaging tools compare them."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def checked(cls: object, distribution: str) -> Offer:
    """Return the offer of a class, or say why it is no strategy that can be named.

    Raises:
        PluginError: If the offer is no strategy class.
    """
    if not isinstance(cls, type) or not issubclass(cls, Strategy) or isabstract(cls):
        message = (
            f"polyak_strategies() offers {cls!r}; expected classes derived from polyak.Strategy that define rate()"
        )
        raise PluginError(message)
    name = cls.model_fields["name"].default
    if not isinstance(name, str) or not name or ":" in name:
        message = f"{cls.__name__} has the name {name!r}; declare it as  name: Literal['my_name'] = 'my_name'"
        raise PluginError(message)
    return Offer(name, cls, distribution)
