"""The exponential moving average by its half-life, in the unit people mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import override

from polyak.strategy.base import Strategy
from polyak.strategy.numbers import Count

if TYPE_CHECKING:
    from polyak.strategy.clock import Clock

__all__ = ["HalfLifeEMA"]

_NEEDS = {"samples": "batch_size", "tokens": "tokens_per_step", "epochs": "steps_per_epoch", "fraction": "total_steps"}
_NULL: Any = {"type": "null"}
_RULES: list[Any] = [
    {
        "properties": {"unit": {"const": unit}, **{other: _NULL for other in _NEEDS.values() if other != field}},
        "required": ["unit", field],
        "not": {"properties": {field: _NULL}},
    }
    for unit, field in _NEEDS.items()
]
_NONE: Any = {"properties": {"unit": {"const": "steps"}, **dict.fromkeys(_NEEDS.values(), _NULL)}}
_SHORTEST = 1e-9  # steps of mean age, for which the half-life is a twentieth of a step and only the last weights count


class HalfLifeEMA(Strategy):
    """The exponential moving average by half-life: ``rate = 1 - 2 ** (-stride / h)``, h in optimiser steps.

    After so many steps (samples, tokens, epochs, or that fraction of the run) what a step counts has halved, whatever
    ``every`` and the size of a batch are.

    Source: the decay of ``ema``, ``2 ** (-1 / h)``; by half-life in Composer (``EMA(half_life=...)``). That the decay
    of a batch κ times as large is ``decay ** κ``: Busbridge et al., "How to Scale Your EMA" (2023), arXiv:2307.13813.

    Often confused with: the horizon ``1 / (1 - decay)``, which is 1.44 times the half-life, and the mean age.

    Examples:
        >>> from polyak import Clock
        >>> HalfLifeEMA(halflife=10).rate(Clock(n=1, step=10, stride=10))
        0.5
        >>> HalfLifeEMA(halflife=2000, unit="samples", batch_size=256).in_steps
        7.8125
    """

    # What the validator says, for editors.
    model_config = ConfigDict(json_schema_extra={"anyOf": [_NONE, *_RULES]})

    source: ClassVar[str] = "Composer, EMA(half_life=...); Busbridge et al. 2023, arXiv:2307.13813"
    elementwise: ClassVar[bool] = True

    name: Literal["ema_halflife"] = "ema_halflife"
    halflife: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """What it takes until a step counts half, in ``unit``."""
    unit: Literal["steps", "samples", "tokens", "epochs", "fraction"] = "steps"
    """What ``halflife`` is measured in; "fraction": in parts of the whole run."""
    batch_size: Count | None = None
    """Samples per optimiser step, all devices and accumulated batches together; for "samples"."""
    tokens_per_step: Count | None = None
    """Tokens per optimiser step; for "tokens"."""
    steps_per_epoch: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Optimiser steps per epoch; for "epochs"."""
    total_steps: Count | None = None
    """Optimiser steps of the whole run; for "fraction"."""

    @model_validator(mode="after")
    def _has_what_the_unit_needs(self) -> Self:
        given = {field for field in _NEEDS.values() if getattr(self, field) is not None}
        needed = {_NEEDS[self.unit]} if self.unit in _NEEDS else set()
        if given != needed:
            wanted = [f"{name}=" for name in _NEEDS.values() if name in needed]
            others = ", ".join(name for name in _NEEDS.values() if name not in needed)
            wants = f"needs {wanted[0]} (and none of {others})" if needed else f"needs none of {others}"
            message = f"unit={self.unit!r} {wants}; got {', '.join(sorted(given)) or 'none'}"
            raise ValueError(message)
        return self

    @property
    def in_steps(self) -> float:
        """The half-life in optimiser steps."""
        if self.unit in {"samples", "tokens"}:
            return self.halflife / (self.batch_size or self.tokens_per_step or 1)
        return self.halflife * (self.steps_per_epoch or self.total_steps or 1)

    @override
    def rate(self, clock: Clock) -> float:
        kept: float = 2.0 ** (-clock.stride / self.in_steps)
        return 1.0 - kept

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        return cls(halflife=math.log(2) / math.log1p(1 / max(age, _SHORTEST)))
