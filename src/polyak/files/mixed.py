"""Averages of files as state dicts in memory, for a function of the user's to evaluate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from polyak.errors import ConfigError, NonFiniteError
from polyak.errors.formatting import shown
from polyak.files.combine import Average
from polyak.files.reading.values import read_values
from polyak.files.stream import Piece, real_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polyak.files.plan import Entry

__all__ = ["metric", "mixed"]

_PIECE = 1 << 18  # values


def mixed(entries: Sequence[Entry], shares: Mapping[int, float]) -> dict[str, Tensor]:
    """Return the weighted mean of some of the files as a state dict; tied names share their tensor.

    Args:
        entries: The tensors, as planned.
        shares: What each file counts, by its index; all others are not read.

    Raises:
        NonFiniteError: If a file has a NaN or an infinity.
    """
    state: dict[str, Tensor] = {}
    average = Average([*shares.values()], raises=True)
    for entry in entries:
        sources = [entry.sources[index] for index in shares]
        count = math.prod(sources[0].shape)
        if not entry.combined:
            made = read_values(entry.sources[max(shares) if entry.chosen else min(shares)], 0, count)
        else:
            flat = torch.empty(count, dtype=real_of(entry), device="cpu")
            for begin in range(0, count, _PIECE):
                end = min(count, begin + _PIECE)
                values = [read_values(stored, begin, end) for stored in sources]
                if average(Piece(entry, begin, end), values, flat[begin:end]) >= 0:
                    message = f"{shown(entry.names[0])} has a NaN or an infinity in one of the files"
                    raise NonFiniteError(message)
            made = torch.view_as_complex(flat.reshape(-1, 2)) if entry.dtype.is_complex else flat
        state |= dict.fromkeys(entry.names, made.reshape(entry.shape))
    return state


def metric(evaluate: Callable[[dict[str, Tensor]], float], state: dict[str, Tensor], *, finite: bool = True) -> float:
    """Return the score that a function of the user's gives a state dict.

    Args:
        evaluate: The function.
        state: The state dict.
        finite: Whether a NaN or an infinity is refused; else it comes back as NaN.

    Raises:
        ConfigError: If it returns no finite number.
    """
    value = evaluate(state)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number, finite = math.nan, True
    if isinstance(value, str) or (finite and not math.isfinite(number)):
        message = f"evaluate() returned {shown(value)}; expected a finite number"
        raise ConfigError(message)
    return number if math.isfinite(number) else math.nan
