"""Choices for rates that take a number or an array: as numpy's, but numbers stay numbers, which are faster by far.

Typed as numbers, as rates are: arrays come only from callers that ask for all rates at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["at_least", "at_most", "where"]


def where(condition: bool, then: float, otherwise: float) -> Any:  # noqa: ANN401, FBT001 - a number or an array; as numpy's
    """Return ``then`` where the condition holds, else ``otherwise``; both are computed.

    Examples:
        >>> where(3 > 2, 1.0, 0.0), where(np.array([1, 3]) > 2, 1.0, 0.0)
        (1.0, array([0., 1.]))
    """
    return (
        np.where(condition, then, otherwise) if isinstance(condition, np.ndarray) else then if condition else otherwise
    )


def at_least(value: float, bound: float) -> Any:  # noqa: ANN401 - a number or an array
    """Return the value, or the bound where that is greater.

    Examples:
        >>> at_least(1.0, 2.0), at_least(np.array([1.0, 3.0]), 2.0)
        (2.0, array([2., 3.]))
    """
    return np.maximum(value, bound) if isinstance(value, np.ndarray) else max(value, bound)


def at_most(value: float, bound: float) -> Any:  # noqa: ANN401 - a number or an array
    """Return the value, or the bound where that is smaller.

    Examples:
        >>> at_most(1.0, 2.0), at_most(np.array([1.0, 3.0]), 2.0)
        (1.0, array([1., 2.]))
    """
    return np.minimum(value, bound) if isinstance(value, np.ndarray) else min(value, bound)
