"""Names to classes of one kind, strategies or merges: who offers them, and which one a name means."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from inspect import isabstract
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from polyak.errors import ConfigError, PluginError
from polyak.errors.formatting import brief, listed, shown
from polyak.registry.offers import Offer, normal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from polyak.registry.offers import Plugin

__all__ = ["BUILT_IN", "Catalog", "Kind"]

BUILT_IN = "polyak"
_SIMILAR = 0.6  # of two names; less is a guess
_LONGEST = 60  # letters of a name for which similar ones are looked up

C = TypeVar("C")


@dataclass(frozen=True)
class Kind(Generic[C]):
    """What a catalogue is of.

    Attributes:
        word: The kind in words.
        hook: The hook that offers classes of it.
        cls: What they derive from.
        needs: What a class has to define.
        unknown: The error of a name that nobody offers.
        habit: Returns a hint for names of other libraries.
    """

    word: str
    hook: str
    cls: type[Any]
    needs: str
    unknown: type[ConfigError]
    habit: Callable[[str], str]


class Catalog(Generic[C]):
    """The classes of one kind that plugins offer, the built-in ones first."""

    def __init__(self, kind: Kind[C]) -> None:
        self.kind = kind
        self.offers: list[Offer[C]] = []

    def answered(self, answers: Iterable[object], distribution: str) -> list[Offer[C]]:
        """Return the offers in what a hook returned.

        Raises:
            PluginError: If they are no classes of the kind, or a name is offered twice.
        """
        offers: list[Offer[C]] = []
        for answer in answers:
            if not isinstance(answer, (list, tuple)):
                message = f"{self.kind.hook}() returned {answer!r}; expected a list of {self.kind.word} classes"
                raise PluginError(message)
            offers += [self._checked(cls, distribution) for cls in answer]
        names = [offer.name for offer in (*self.offers, *offers) if offer.distribution == distribution]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            message = f"{distribution} offers {', '.join(map(repr, twice))} more than once"
            raise PluginError(message)
        return offers

    def named(self) -> dict[str, Offer[C]]:
        """Return all names that can be chosen."""
        return {self.key(offer): offer for offer in self.offers}

    def key(self, offer: Offer[C]) -> str:
        """Return the name by which an offer is chosen."""
        first, *others = self.of(offer.name)
        alone = first is offer if first.distribution == BUILT_IN else not others
        return offer.name if alone else f"{offer.distribution}:{offer.name}"

    def of(self, name: str) -> list[Offer[C]]:
        """Return the offers of a name; the built-ins were registered first, so they come first."""
        return [offer for offer in self.offers if offer.name == name]

    def resolve(self, name: str, plugins: Sequence[Plugin]) -> type[C]:
        """Return the class of a name, or of ``"dist:name"``.

        Args:
            name: The name.
            plugins: What became of each plugin, for the message.

        Raises:
            ConfigError: If no plugin offers the name, or two do.
        """
        distribution, colon, short = name.rpartition(":")
        wanted = normal(distribution)
        rivals = [offer for offer in self.of(short) if not colon or normal(offer.distribution) == wanted]
        if not rivals:
            raise self.kind.unknown(self._unknown(name, plugins))
        if len(rivals) > 1 and rivals[0].distribution != BUILT_IN:
            choices = " or ".join(repr(f"{offer.distribution}:{offer.name}") for offer in rivals)
            message = f"the {self.kind.word} {name!r} is offered by {len(rivals)} plugins; choose {choices}"
            raise self.kind.unknown(message)
        return rivals[0].cls

    def _unknown(self, name: str, plugins: Sequence[Plugin]) -> str:
        known = list(self.named())
        forms = (name, name.rpartition(":")[2], name.lower()) if len(name) <= _LONGEST else ()
        near = [match for form in forms for match in get_close_matches(form, known, 1, _SIMILAR)]
        hint = self.kind.habit(name) or (f" Did you mean {near[0]!r}?" if near else "")
        failed = "".join(f"\n  plugin {p.name} ({p.distribution} {p.version}): {p.error}" for p in plugins if p.error)
        because = f"\nThese plugins are not there:{failed}" if failed else ""
        return brief(f"no {self.kind.word} is called {shown(name)}.{hint} Known: {listed(known)}.{because}")

    def _checked(self, cls: Any, distribution: str) -> Offer[C]:  # noqa: ANN401 - whatever a plugin offers
        kind = self.kind
        if not isinstance(cls, type) or not issubclass(cls, kind.cls) or isabstract(cls):
            message = f"{kind.hook}() offers {cls!r}; expected classes derived from {kind.needs}"
            raise PluginError(message)
        fields: Any = getattr(cls, "model_fields", {})
        name = fields["name"].default
        if not isinstance(name, str) or not name or ":" in name:
            message = f"{cls.__name__} has the name {name!r}; declare it as  name: Literal['my_name'] = 'my_name'"
            raise PluginError(message)
        return Offer(name, cls, distribution)
