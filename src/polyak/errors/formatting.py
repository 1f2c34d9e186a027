"""Values, messages and sizes as texts that a terminal can show, whatever they hold."""

from __future__ import annotations

from reprlib import Repr
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["brief", "byte_size", "listed", "shortened", "shown", "type_name"]

_WIDTH = 100
_LINES = 10
_LINE_WIDTH = 600
_NAMES = 40
_DIGITS = 200  # longer integers take long to print, or cannot be printed at all
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEP = 1024  # from one unit to the next
_OPAQUE = {("torch", "Module"), ("torch", "Tensor"), ("torch", "Optimizer"), ("numpy", "ndarray")}


class _Short(Repr):
    """Bounds depth, breadth and length; names the types whose repr is long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, _WIDTH, _WIDTH, _WIDTH
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4

    @override
    def repr_instance(self, x: Any, level: int) -> str:
        if any((base.__module__.partition(".")[0], base.__name__) in _OPAQUE for base in type(x).__mro__):
            return f"<{type(x).__name__}>"
        return super().repr_instance(x, level)

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - reprlib's signature
        bits = x.bit_length()
        return repr(x) if bits < _DIGITS else f"<an integer of {bits} bits>"

    def repr_bool(self, x: bool, level: int) -> str:  # noqa: ARG002, FBT001 - reprlib's signature
        return repr(x)


_SHORT = _Short()


def shown(value: object) -> str:
    """Return a short repr of any value: bounded in time and length, and a type name for models and tensors.

    Examples:
        >>> shown(0.5), len(shown("x" * 10_000_000))
        ('0.5', 100)
    """
    return _SHORT.repr(value)


def counted(n: int, what: str) -> str:
    """Return a number of things.

    Examples:
        >>> counted(1, "update"), counted(2, "update")
        ('1 update', '2 updates')
    """
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def type_name(value: object) -> str:
    """Return the name of a value's type; an averager is an averager, whatever class makes it.

    Examples:
        >>> type_name(0.5)
        'float'
    """
    return str(getattr(type(value), "_kind", type(value).__name__))


def listed(names: Iterable[str]) -> str:
    """Return names separated by commas, the first of them where there are many.

    Examples:
        >>> listed(["a", "b"])
        'a, b'
    """
    known = list(names)
    more = f" and {len(known) - _NAMES} more" if len(known) > _NAMES else ""
    return ", ".join(known[:_NAMES]) + more


def shortened(items: Sequence[str], most: int, separator: str = "\n  ") -> str:
    """Return at most so many items, joined, and how many more there are.

    Examples:
        >>> shortened(["a", "b", "c"], 2, "; ")
        'a; b; … and 1 more'
    """
    more = [f"… and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def byte_size(nbytes: float, unit: str = "") -> str:
    """Return a number of bytes in binary units; in the largest that fits, or in the wanted one.

    Examples:
        >>> byte_size(300), byte_size(2**20 + 2**19), byte_size(2**19, "MiB")
        ('300 B', '1.5 MiB', '0.5 MiB')
    """
    power = 0
    while _UNITS[power] != unit if unit else nbytes >= _STEP and power + 1 < len(_UNITS):
        nbytes, power = nbytes / _STEP, power + 1
    return f"{nbytes:,.{min(power, 1)}f} {_UNITS[power]}"


def brief(message: str) -> str:
    """Return a message in at most ten lines, each of bounded length."""
    lines = message.splitlines()
    more = [f"  ... and {len(lines) - _LINES + 1} more lines"] if len(lines) > _LINES else []
    kept = lines[: _LINES - len(more)]
    return "\n".join([line if len(line) <= _LINE_WIDTH else f"{line[:_LINE_WIDTH]} ..." for line in kept] + more)
