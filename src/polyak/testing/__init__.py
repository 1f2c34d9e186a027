"""The laws that every strategy obeys, as a test for those who write one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyak.config import AveragerConfig
from polyak.config.chosen import AnyStrategy, plain_mapping, written
from polyak.registry import registry
from polyak.testing.laws import LAWS
from polyak.testing.merges import check_merge
from polyak.testing.rates import Case, learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polyak.strategy.base import Strategy

__all__ = ["check_merge", "check_strategies", "check_strategy", "learning_rate"]


def check_strategy(
    strategy: AnyStrategy | AveragerConfig, *, lr: Callable[[int], float] = learning_rate, **settings: Any
) -> None:
    """Check that a strategy obeys the laws: rates, shares, fixed point, kernels, cadence, resume, configs, copies.

    Takes a second at most and no network, and leaves the global random state alone.

    Args:
        strategy: What ``polyak.average`` takes: a name, a class, an object, or a mapping of a name and settings.
        lr: The learning rate at each optimiser step, given to ``update(lr=...)``.
        **settings: The strategy's own settings, where it is a name, a class or a mapping.

    Raises:
        AssertionError: If a law is broken. The message names each one, with the numbers.
        ConfigError: If there is no such strategy, or a setting is wrong.

    Examples:
        >>> import polyak
        >>> from polyak.testing import check_strategy
        >>> check_strategy(polyak.EMA, decay=0.9)
    """
    case = Case(_instance(strategy, settings), lr)
    problems: list[str] = []
    for number, (title, law) in enumerate(LAWS.items()):
        try:
            law(case)
        except Exception as error:  # noqa: BLE001 - whatever a strategy under test raises is a finding
            said = str(error) if isinstance(error, AssertionError) else f"raised {type(error).__name__}: {error}"
            problems.append(f"\n  {title}: {said}")
        if problems and not number:
            break  # without rates that can be used, every other law would only say the same again
    if problems:
        message = f"{case.strategy!r} breaks {len(problems)} of the laws of averaging:{''.join(problems)}"
        raise AssertionError(message)


def check_strategies(
    strategies: Iterable[AnyStrategy | AveragerConfig] | None = None,
    *,
    lr: Callable[[int], float] = learning_rate,
) -> None:
    """Check several strategies; where none are given, all that are installed and need no settings.

    See ``check_strategy``.

    Args:
        strategies: Names, classes, objects or mappings.
        lr: The learning rate at each optimiser step.

    Raises:
        AssertionError: If a strategy breaks a law. The message names each strategy and law.

    Examples:
        >>> import polyak
        >>> from polyak.testing import check_strategies
        >>> check_strategies([polyak.EMA, polyak.SWA(), "ema_v3"])
    """
    problems = []
    for strategy in _ready() if strategies is None else strategies:
        try:
            check_strategy(strategy, lr=lr)
        except AssertionError as error:
            problems.append(str(error))
    if problems:
        raise AssertionError("\n".join(problems))


def _ready() -> list[str]:
    fields = {name: cls.model_fields.values() for name, cls in registry().strategies().items()}
    return [name for name, own in fields.items() if not any(field.is_required() for field in own)]


def _instance(strategy: AnyStrategy | AveragerConfig, settings: dict[str, Any]) -> Strategy:
    where = "check_strategy(): the strategy"
    strategy = plain_mapping(strategy)
    if isinstance(strategy, AveragerConfig) or (isinstance(strategy, Mapping) and "strategy" in strategy):
        strategy = AveragerConfig.of(strategy, where).strategy
    return AveragerConfig.of({"strategy": written(strategy, settings)}, where).strategy
