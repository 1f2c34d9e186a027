"""What the matrix is made of: one cell for each strategy, architecture and reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polyak

EXACT = "float64"
"""The name of the reference that is no library: the sum of shares times weights in float64."""
AT_ODDS = 1e-4
"""From this relative difference on two averages are not the same."""
SETTINGS: dict[str, Any] = {"decay": 0.98, "use_warmup": True}
"""What differs from the defaults, for every strategy that has such a setting: in a short run 0.9999 moves nothing."""


@dataclass(frozen=True)
class Cell:
    """One strategy on one architecture against one reference.

    Attributes:
        error: The largest difference, as a share of the largest value of the tensor it is in; None: not comparable.
        speed: The library's time per update over polyak's, above 1 polyak is faster.
        milliseconds: polyak's time per update in this comparison.
        remark: What a reader must know, in a word or two.
    """

    strategy: str
    architecture: str
    reference: str
    error: float | None = None
    speed: float | None = None
    milliseconds: float | None = None
    remark: str = ""

    @property
    def odd(self) -> bool:
        """Whether the two averages are not the same."""
        return self.error is not None and self.error > AT_ODDS


def needed(name: str) -> list[str]:
    """Return the settings without which a strategy cannot be made, and which the matrix does not know."""
    fields = polyak.strategies()[name].model_fields
    return [key for key, field in fields.items() if field.is_required() and key not in SETTINGS]


def settled(name: str) -> polyak.Strategy:
    """Return the strategy of a name with the matrix's settings, as far as it has them."""
    cls = polyak.strategies()[name]
    return cls(**{key: value for key, value in SETTINGS.items() if key in cls.model_fields})
