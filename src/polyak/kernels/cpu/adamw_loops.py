"""The loops of AdamW and of an average that follows it, compiled by Numba: one pass over five streams of memory.

The order of the operations is that of torch's fused kernel for CPUs, which rounds a product and a sum once: in vectors
the square's product is added so, in what is left of a tensor behind its last whole vector the moment's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types
from numba.extending import intrinsic

from polyak.kernels.cpu.floats import finite
from polyak.kernels.cpu.loops import add_product, jit, pointer

__all__ = ["COLUMNS", "get", "put", "step"]

COLUMNS = ("sign", "kept", "first", "second", "square", "root", "eps", "minus")
"""What a row of coefficients has: the sign of the gradients, ``1 - lr * weight_decay``, ``1 - beta1``, ``beta2``,
``1 - beta2``, the root of the second moment's bias correction, ``eps``, and minus the step's size."""

_HALF, _ONE = np.float32(0.5), np.float32(1)
_VECTOR = 8  # elements: what torch's kernel is compiled to compute at once, and on AVX-512 the least of it
_VECTORS, _REST = True, False  # whether torch makes vectors of the elements
# The streams: no address of one is an address of another.
_PARAM, _GRAD, _FIRST, _SECOND, _AVERAGE = range(5)


def _alone(module: Any, instruction: Any, stream: int) -> None:
    # Else LLVM would compare each two of the addresses, and does not for so many: it would make no vectors.
    domain = module.add_metadata([ir.MetaDataString(module, "polyak adamw")])
    scopes = [module.add_metadata([ir.MetaDataString(module, f"polyak {i}"), domain]) for i in range(5)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    instruction.set_metadata("noalias", module.add_metadata([s for i, s in enumerate(scopes) if i != stream]))


@intrinsic(prefer_literal=True)
def _read(_: Any, place: Any, i: Any, stream: Any) -> Any:
    """Return element ``i`` of a stream."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        found = builder.load(builder.gep(args[0], [args[1]]))
        _alone(builder.module, found, stream.literal_value)
        return found

    return place.dtype(place, i, stream), generate


@intrinsic(prefer_literal=True)
def _write(_: Any, place: Any, i: Any, value: Any, stream: Any) -> Any:
    """Write element ``i`` of a stream."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _alone(builder.module, builder.store(args[2], builder.gep(args[0], [args[1]])), stream.literal_value)

    return types.void(place, i, value, stream), generate


@jit(inline="always")
def _moved(param: Any, grad: Any, first: Any, second: Any, i: Any, row: Any, whole: Any) -> Any:
    """Move element ``i`` of a parameter and of its moments; return its new value."""
    slope = _read(grad, i, _GRAD) * row[0]
    old: Any = _read(first, i, _FIRST)
    was: Any = _read(second, i, _SECOND)
    near = row[2] < _HALF  # as torch's lerp, from the nearer end
    mean = add_product(row[2] if near else row[2] - _ONE, slope - old, old if near else slope)
    scaled = row[4] * slope
    square = add_product(scaled, slope, was * row[3]) if whole else add_product(was, row[3], scaled * slope)
    _write(first, i, mean, _FIRST)
    _write(second, i, square, _SECOND)
    value = _read(param, i, _PARAM) * row[1] + (row[7] * mean) / (np.sqrt(square) / row[5] + row[6])
    _write(param, i, value, _PARAM)
    return value


@jit()
def _step_piece(param: Any, grad: Any, first: Any, second: Any, row: Any, size: Any) -> None:
    whole = size - size % _VECTOR
    for i in range(whole):
        _moved(param, grad, first, second, i, row, _VECTORS)
    for i in range(whole, size):
        _moved(param, grad, first, second, i, row, _REST)


@jit(inline="always")
def _follow(average: Any, i: Any, new: Any, rate: Any, hold: Any) -> Any:
    """Move element ``i`` of an average; return whether it was held."""
    near = rate < _HALF
    old: Any = _read(average, i, _AVERAGE)
    value = add_product(rate if near else rate - _ONE, new - old, old if near else new)
    value = new if rate == _ONE else value  # a sum would keep a NaN of the average
    held = hold and not finite(value)
    _write(average, i, old if held else value, _AVERAGE)
    return np.uint32(held)


@jit()
def _average_piece(
    param: Any, grad: Any, first: Any, second: Any, average: Any, row: Any, size: Any, rate: Any, hold: Any
) -> int:
    """Make a step of a piece and move its average; return how many elements were held."""
    whole = size - size % _VECTOR
    held = np.uint32(0)
    for i in range(whole):
        moved = _moved(param, grad, first, second, i, row, _VECTORS)
        held = np.uint32(held + _follow(average, i, moved, rate, hold))
    for i in range(whole, size):
        moved = _moved(param, grad, first, second, i, row, _REST)
        held = np.uint32(held + _follow(average, i, moved, rate, hold))
    return np.int64(held) - _begin_anew(param, average, size) if held else 0


@jit()
def _begin_anew(param: Any, average: Any, size: Any) -> int:
    begun = 0
    for i in range(size):
        new: Any = _read(param, i, _PARAM)
        if finite(new) and not finite(_read(average, i, _AVERAGE)):
            _write(average, i, new, _AVERAGE)
            begun += 1
    return begun


@jit()
def step(
    places: Any,
    sizes: Any,
    tensors: Any,
    rows: Any,
    first: int,
    last: int,
    rate: Any,
    like: Any,
    hold: Any,
    held: Any,
    done: Any,
) -> None:
    """Make a step of pieces ``first`` to ``last``, and move those averages that there are.

    Args:
        places: Addresses, streams × pieces: parameters, gradients, both moments, averages; 0 where there is none.
        sizes: Elements in each piece.
        tensors: The number of each piece's tensor.
        rows: The coefficients of each tensor; see ``COLUMNS``.
        first: The first piece.
        last: The piece to stop before.
        rate: The rate of the average, a float32.
        like: An empty array of float32.
        hold: Whether elements of an average keep their old value where the new one would not be finite.
        held: How many of these each piece has.
        done: One flag, set at the end.
    """
    for piece in range(first, last):
        param: Any = pointer(places[0, piece], like)
        grad: Any = pointer(places[1, piece], like)
        mean: Any = pointer(places[2, piece], like)
        square: Any = pointer(places[3, piece], like)
        row, size = rows[tensors[piece]], sizes[piece]
        if places[4, piece] == 0:
            _step_piece(param, grad, mean, square, row, size)
        else:
            average = pointer(places[4, piece], like)
            held[piece] = _average_piece(param, grad, mean, square, average, row, size, rate, hold)
    done[0] = True


@jit()
def get(addresses: Any, values: Any) -> None:
    """Read one element at each address."""
    for i in range(len(addresses)):
        values[i] = pointer(addresses[i], values)[0]


@jit()
def put(addresses: Any, values: Any) -> None:
    """Write one element at each address; twice is once."""
    for i in range(len(addresses)):
        pointer(addresses[i], values)[0] = values[i]
