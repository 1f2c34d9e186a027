"""Numbers as a reader wants them."""

from __future__ import annotations

__all__ = ["number"]

_HUNDRED = 100


def number(value: float) -> str:
    """Return a number with the three digits that count.

    Examples:
        >>> [number(value) for value in (0.01234, 1.5, 61.23, 1234.5)]
        ['0.0123', '1.50', '61.2', '1,234']
    """
    if abs(value) >= _HUNDRED or value == 0:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return f"{value:.6f}" if "e" in text else text
