"""The loops of the fused CPU kernel, compiled by Numba on first use and cached on disk.

They see memory as addresses; what a float is, the type of a ``like`` array says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]  # it ships no types
from numba import carray, types
from numba.extending import intrinsic

from polyak.kernels.cpu.cache import jit
from polyak.kernels.cpu.floats import finite, mixed, narrowed, noise_for, widened
from polyak.kernels.rounding import rounds_once

__all__ = ["add_product", "all_finite", "copy", "fetch", "jit", "move", "pointer"]

_AHEAD = 4  # pieces: where they are short, memory takes longer than the work on several
_LINES = (np.uint64(0), np.uint64(64), np.uint64(128), np.uint64(192))  # bytes: what is asked for of a piece ahead


@intrinsic
def pointer(_: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to the elements that ``like`` has."""
    signature = types.CPointer(like.dtype)(address, like)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return signature, generate


@intrinsic
def fetch(_: Any, address: Any) -> Any:
    """Ask for the line of the cache at an address, which need not be one: nothing waits for it."""
    signature = types.void(address)

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        number, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (place,), kind)
        reading, often, data = number(0), number(3), number(1)
        builder.call(prefetch, [builder.inttoptr(args[0], place), reading, often, data])
        return None

    return signature, generate


@intrinsic
def add_product(_: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, rounded as often as torch rounds it on this processor."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        if not rounds_once():
            return builder.fadd(builder.fmul(args[0], args[1]), args[2])
        kind = args[0].type
        # Processors without such an instruction call the C library, which must be at hand.
        name = "llvm.fma" if all(map(binding.address_of_symbol, ("fma", "fmaf"))) else "llvm.fmuladd"
        function = ir.FunctionType(kind, [kind, kind, kind])
        return builder.call(builder.module.declare_intrinsic(name, (kind,), function), args)

    return a(a, b, c), generate


@jit()
def _move_piece(average: Any, weight: Any, rate: Any, seed: Any) -> None:
    # As torch's lerp, from the nearer end; the sum is made in the type of the rate.
    wide = type(rate)
    if abs(rate) < wide(0.5):
        for i in range(average.size):
            old, new = wide(widened(average[i])), wide(widened(weight[i]))
            value: Any = add_product(rate, new - old, old)
            average[i] = narrowed(value, noise_for(seed, i, average[i]), average[i])
    else:
        back = rate - wide(1)
        for i in range(average.size):
            old, new = wide(widened(average[i])), wide(widened(weight[i]))
            value = add_product(back, new - old, new)
            average[i] = narrowed(value, noise_for(seed, i, average[i]), average[i])


@jit()
def _hold_piece(average: Any, weight: Any, rate: Any, seed: Any) -> int:
    """Move a piece as ``_move_piece``, but for elements that would not be finite; return how many these are."""
    wide = type(rate)
    near = abs(rate) < wide(0.5)
    factor = rate if near else rate - wide(1)
    held = np.uint32(0)
    for i in range(average.size):
        kept = average[i]
        old, new = wide(widened(kept)), wide(widened(weight[i]))
        value: Any = add_product(factor, new - old, old if near else new)
        moved = narrowed(value, noise_for(seed, i, kept), kept)
        fits = finite(moved)
        average[i] = moved if fits else kept
        held = np.uint32(held + np.uint32(not fits))
    return np.int64(held) - _begin_anew(average, weight, rate, seed) if held else 0


@jit()
def _begin_anew(average: Any, weight: Any, rate: Any, seed: Any) -> int:
    """Replace averages that are not finite themselves by their weights where these are; return how many these are."""
    wide = type(rate)
    begun = 0
    for i in range(average.size):
        kept = average[i]
        if not finite(kept):
            moved = narrowed(wide(widened(weight[i])), noise_for(seed, i, kept), kept)
            if finite(moved):
                average[i] = moved
                begun += 1
    return begun


@jit()
def _fetch_piece(starts: Any, piece: int) -> None:
    for line in _LINES:
        fetch(starts[piece] + line)


@jit()
def move(
    averages: Any,
    weights: Any,
    sizes: Any,
    first: int,
    last: int,
    rates: Any,
    seed: Any,
    average: Any,
    weight: Any,
    hold: Any,
    held: Any,
    done: Any,
) -> None:
    """Move pieces ``first`` to ``last`` of each lane.

    Args:
        averages: Addresses, lanes × pieces.
        weights: Addresses of the pieces.
        sizes: Elements in each piece.
        first: The first piece to move.
        last: The piece to stop before.
        rates: The rate of each lane, in the type the sum is made in.
        seed: 32 random bits for each lane.
        average: An empty array of the type of the averages.
        weight: An empty array of the type of the weights.
        hold: Whether elements whose new value would not be finite keep their old one.
        held: How many of these each piece has, lanes × pieces; written where ``hold``.
        done: One flag, set at the end.
    """
    # Forwards: backwards, the processor does not fetch the next piece before it is needed, which costs a tenth.
    for piece in range(first, last):
        ahead = min(piece + _AHEAD, last - 1)
        _fetch_piece(weights, ahead)
        _fetch_piece(averages[0], ahead)
        source = carray(pointer(weights[piece], weight), (sizes[piece],))
        for lane in range(len(rates)):
            if rates[lane] == 1:  # it is copied: a sum would keep a NaN of the average
                continue
            target = carray(pointer(averages[lane, piece], average), (sizes[piece],))
            if hold:
                held[lane, piece] = _hold_piece(target, source, rates[lane], mixed(seed[lane], piece))
            else:
                _move_piece(target, source, rates[lane], mixed(seed[lane], piece))
    done[0] = True


@jit()
def copy(targets: Any, sources: Any, sizes: Any, first: int, last: int, byte: Any, done: Any) -> None:
    """Copy pieces ``first`` to ``last``, of ``sizes`` bytes; ``byte`` is an empty array, ``done`` is set at the end."""
    for piece in range(first, last):
        source = carray(pointer(sources[piece], byte), (sizes[piece],))
        target = carray(pointer(targets[piece], byte), (sizes[piece],))
        for i in range(sizes[piece]):
            target[i] = source[i]
    done[0] = True


@jit()
def all_finite(weights: Any, sizes: Any, first: int, last: int, masks: Any) -> bool:
    """Return whether no element of some pieces has all the bits set that the one element of ``masks`` has."""
    mask = masks[0]
    unsigned = type(mask)
    for piece in range(first, last):
        _fetch_piece(weights, min(piece + _AHEAD, last - 1))
        bits = carray(pointer(weights[piece], masks), (sizes[piece],))
        largest = unsigned(0)
        for i in range(bits.size):
            largest = max(largest, unsigned(bits[i] & mask))
        if largest == mask:
            return False
    return True
