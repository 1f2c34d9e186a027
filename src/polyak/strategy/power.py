"""The power-function average, by its relative width or its exponent."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import override

from polyak.strategy.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.strategy.clock import Clock

__all__ = ["PowerEMA", "gamma_of", "sigma_rel_of"]

_WIDEST = 12**-0.5
_DEFAULT = 0.1


def sigma_rel_of(gamma: float) -> float:
    """Return the standard deviation of a power function's age, as a part of the run.

    Args:
        gamma: The exponent of the shares, from 0 on.

    Examples:
        >>> round(sigma_rel_of(6.9372039376), 9)
        0.1
    """
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


@lru_cache(maxsize=1024)
def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a power function whose age has this standard deviation, as a part of the run.

    It is the largest root of ``(x + 2)**2 * (x + 3) * sigma_rel**2 = x + 1``.

    Args:
        sigma_rel: The relative width, above 0 and at most 12 ** -0.5, the plain mean's.

    Examples:
        >>> round(gamma_of(0.1), 10)
        6.9372039376
    """
    square = sigma_rel**2
    x, last = 1.0 / sigma_rel, math.inf
    while x < last:  # above its largest root a cubic is convex: Newton's steps go down to it, until rounding stops them
        value = (x + 2.0) ** 2 * (x + 3.0) * square - (x + 1.0)
        x, last = x - value / ((x + 2.0) * (3.0 * x + 8.0) * square - 1.0), x
    return max(0.0, x)


class PowerEMA(Strategy):
    """The power-function average: ``rate = 1 - (1 - stride / elapsed) ** (gamma + 1)``, for shares like ``i ** gamma``.

    The window is a fixed part of the run, however long that is: its standard deviation is ``sigma_rel`` of it. The
    first update replaces the start. Exact for any ``every``: update i, at step t of T, has the share
    ``(t**(gamma + 1) - (t - every)**(gamma + 1)) / T**(gamma + 1)``.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2023),
    arXiv:2312.02696, section 3.1; matched with ``ema_pytorch.KarrasEMA`` of ema-pytorch 0.8.3 with ``update_every=1``.

    Often confused with: ``polynomial``, whose shares are ``i ** eta`` but for rounding to whole steps; and with
    ``warmup_power`` of ``ema_v3``, whose window grows like a power of the run.

    Examples:
        >>> from polyak import Clock
        >>> strategy = PowerEMA(sigma_rel=0.05)
        >>> round(strategy.exponent, 4), round(strategy.rate(Clock(n=1000, step=1000)), 4)
        (16.9722, 0.0178)
        >>> PowerEMA(gamma=1).rate(Clock(n=2, step=2))
        0.75
    """

    # What the validator says, for editors.
    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"properties": {key: {"type": "null"}}} for key in ("sigma_rel", "gamma")]}
    )

    source: ClassVar[str] = "Karras et al. 2023, arXiv:2312.02696, section 3.1; ema-pytorch 0.8.3, KarrasEMA"
    elementwise: ClassVar[bool] = True

    name: Literal["power"] = "power"
    sigma_rel: Annotated[float, Field(gt=0, lt=_WIDEST)] | None = None
    """The standard deviation of the age as a part of the run, in (0, 0.2887); 0.1 where neither is given."""
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The exponent of the shares, in place of ``sigma_rel``; 0 is the plain mean."""

    @model_validator(mode="before")
    @classmethod
    def _has_one(cls, data: Any) -> Any:  # noqa: ANN401 - a validator takes whatever the user wrote
        if not isinstance(data, dict):
            return data
        given = {key: data[key] for key in ("sigma_rel", "gamma") if data.get(key) is not None}
        if len(given) > 1:
            message = f"the width is given by 'sigma_rel' or by 'gamma', not by both; got {given}"
            raise ValueError(message)
        return data if given else {**data, "sigma_rel": _DEFAULT}

    @property
    def exponent(self) -> float:
        """The exponent of the shares: ``gamma``, or what ``sigma_rel`` means."""
        return gamma_of(self.sigma_rel or _DEFAULT) if self.gamma is None else self.gamma

    @property
    def width(self) -> float:
        """The standard deviation of the age as a part of the run: ``sigma_rel``, or what ``gamma`` means."""
        return sigma_rel_of(self.exponent)

    @override
    def rate(self, clock: Clock) -> float:
        kept: float = (1.0 - clock.stride / clock.elapsed) ** (self.exponent + 1.0)
        return 1.0 - kept

    @override
    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}

    @classmethod
    @override
    def with_mean_age(cls, age: float, steps: int) -> Self:
        gamma = max(0.0, steps / (age + 0.5) - 2.0)
        width = sigma_rel_of(gamma)
        return cls(sigma_rel=width) if width < _WIDEST else cls(gamma=0.0)
