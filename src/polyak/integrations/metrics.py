"""What loggers get of an average."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak.engine.averager import Averager

__all__ = ["logged"]

_LOGGED = ("rate", "distance", "half_life", "n", "skipped", "held")


def logged(averager: Averager) -> dict[str, float]:
    """Return the numbers of ``averager.metrics()`` that are logged, each as ``polyak/<name>``.

    Those that an average has none of are left out, as those of a mean without a half-life.
    """
    found = averager.metrics()
    return {f"polyak/{name}": float(found[name]) for name in _LOGGED if math.isfinite(found[name])}
