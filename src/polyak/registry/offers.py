"""What plugins offer, and what became of each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Generic, NamedTuple, TypeVar

from polyak.errors import ConfigError, UnknownMergeError, UnknownStrategyError
from polyak.errors.formatting import listed, shown
from polyak.merges.base import Merge
from polyak.strategy.base import Strategy

__all__ = ["Merges", "Named", "Offer", "Plugin", "Strategies", "normal"]

C = TypeVar("C")


class Offer(NamedTuple, Generic[C]):
    """One class and the distribution that offers it."""

    name: str
    cls: type[C]
    distribution: str


class Plugin(NamedTuple):
    """What became of one entry point: ``error`` is empty where it loaded, and ``offers`` names its classes."""

    name: str
    distribution: str
    version: str
    target: str
    error: str = ""
    offers: tuple[str, ...] = ()


class Named(Mapping[str, type[C]]):
    """All names that can be chosen, with their classes.

    A name that two plugins offer is listed as ``"dist:name"`` for each of them.
    """

    _word: ClassVar[str] = "class"
    _words: ClassVar[str] = "classes"
    _unknown: ClassVar[type[ConfigError]] = ConfigError

    def __init__(self, offers: Mapping[str, Offer[C]]) -> None:
        self._offers = dict(offers)

    def __getitem__(self, name: str) -> type[C]:
        return self._offer(name).cls

    def __iter__(self) -> Iterator[str]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def __repr__(self) -> str:
        return f"<{self._words}: {', '.join(f'{name} ({offer.distribution})' for name, offer in self._offers.items())}>"

    def distribution(self, name: str) -> str:
        """Return the distribution that offers a name."""
        return self._offer(name).distribution

    def _offer(self, name: str) -> Offer[C]:
        if name not in self._offers:
            message = f"no {self._word} is called {shown(name)}. Known: {listed(self._offers)}"
            raise self._unknown(message)
        return self._offers[name]


def normal(name: str) -> str:
    """Return the name of a distribution or entry point as packaging tools compare them."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


class Strategies(Named[Strategy]):
    """All strategies that can be chosen, by name.

    Examples:
        >>> import polyak
        >>> polyak.strategies()["swa"], polyak.strategies().distribution("swa")
        (<class 'polyak.strategy.swa.SWA'>, 'polyak')
    """

    _word, _words, _unknown = "strategy", "strategies", UnknownStrategyError


class Merges(Named[Merge]):
    """All merges that can be chosen, by name.

    Examples:
        >>> from polyak import files
        >>> files.merges().distribution("ties")
        'polyak'
    """

    _word, _words, _unknown = "merge", "merges", UnknownMergeError
