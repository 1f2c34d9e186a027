"""The hooks a plugin may implement. They only ever gain arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from polyak.engine.averager import Averager
    from polyak.merges.base import Merge
    from polyak.strategy.base import Strategy
    from polyak.strategy.clock import Clock

__all__ = ["GROUP", "hookimpl", "polyak_merges", "polyak_strategies", "polyak_updated"]

GROUP = "polyak"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Marks a plugin's implementation of a hook."""


@hookspec
def polyak_strategies() -> list[type[Strategy]]:
    """Return the strategy classes that a plugin offers.

    Called once, when names are first resolved. Each class names itself (``name: Literal["..."] = "..."``).
    Built-in names cannot be replaced; of two plugins that offer one name, users choose with ``"dist:name"``.

    Examples:
        A whole plugin, apart from the entry point ``[project.entry-points.polyak]`` ``root = "polyak_root"``:

        >>> from typing import Annotated, Literal
        >>> import polyak
        >>> from pydantic import Field
        >>> class Root(polyak.Strategy):
        ...     '''A horizon that grows like a power of the updates: ``rate = n ** -power``.'''
        ...     name: Literal["root"] = "root"
        ...     power: Annotated[float, Field(gt=0, le=1)] = 0.5
        ...     def rate(self, clock: polyak.Clock) -> float:
        ...         return clock.n**-self.power
        >>> @polyak.hookimpl
        ... def polyak_strategies() -> list[type[polyak.Strategy]]:
        ...     return [Root]
        >>> polyak_strategies()[0]().rate(polyak.Clock(n=4, step=4))
        0.5
    """
    raise NotImplementedError  # pragma: no cover - pluggy reads the signature only


@hookspec
def polyak_merges() -> list[type[Merge]]:
    """Return the merge classes that a plugin offers, for ``polyak.files.merge`` and ``polyak merge``.

    Called once, when names are first resolved. Names and clashes are as for strategies.

    Examples:
        >>> from typing import Literal
        >>> import polyak
        >>> class First(polyak.files.Merge):
        ...     '''The first input, as it is.'''
        ...     name: Literal["first"] = "first"
        ...     elementwise = True
        ...     def merge(self, tensors, base, about):
        ...         return tensors[0]
        >>> @polyak.hookimpl
        ... def polyak_merges() -> list[type[polyak.files.Merge]]:
        ...     return [First]
    """
    raise NotImplementedError  # pragma: no cover - pluggy reads the signature only


@hookspec
def polyak_updated(averager: Averager, clock: Clock) -> None:
    """Take notice of an averaged update, after it was made: for loggers and recorders.

    Called once per averaged update of every averager, never for calls that average nothing. An exception goes
    on to the caller of ``update``; the update itself is done by then.

    Args:
        averager: The averager; ``averager.rate`` is the rate just used.
        clock: The moment of the update.

    Examples:
        >>> import polyak
        >>> @polyak.hookimpl
        ... def polyak_updated(averager, clock):
        ...     print(f"update {clock.n}: rate {averager.rate:.3f}")
    """
