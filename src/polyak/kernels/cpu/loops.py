"""The loops of the fused CPU kernel, compiled by Numba on first use and cached on disk.

They see memory as addresses. What a float is, the type of a ``like`` array says: Numba knows neither bfloat16 nor
float16, so their bits travel as uint16 and as int16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]  # it ships no types
from numba import carray, types
from numba.extending import intrinsic, overload

from polyak.kernels.cpu.cache import jit
from polyak.kernels.rounding import rounds_once

__all__ = ["add_product", "all_finite", "copy", "fetch", "finite", "jit", "move", "pointer"]

_AHEAD = 4  # pieces: where they are short, memory takes longer than the work on several
_LINES = (np.uint64(0), np.uint64(64), np.uint64(128), np.uint64(192))  # bytes: what is asked for of a piece ahead
_EXPONENTS = {types.uint16: np.uint16(0x7F80), types.int16: np.uint16(0x7C00)}
"""The bits of the exponent of short floats, all set in what is not finite."""
_ROUNDS = (np.uint32(0x7FEB352D), np.uint32(0x846CA68B))  # lowbias32, a public-domain hash of 32 bits


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


def _wide(bits: Any) -> Any:
    """Return the float that some bits mean, in at least 32 bits."""


@overload(_wide, strict=False)
def _overload_wide(bits: Any) -> Any:
    if bits == types.uint16:

        def bfloat16(bits: Any) -> Any:
            return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)

        return bfloat16
    if bits == types.int16:

        def float16(bits: Any) -> Any:
            raw = np.uint32(np.uint16(bits))
            sign = np.uint32((raw & np.uint32(0x8000)) << np.uint32(16))
            rest = np.uint32((raw & np.uint32(0x7FFF)) << np.uint32(13))
            # The exponents differ by 112; the product is exact, for subnormal values too.
            scaled = np.float32(np.uint32(rest).view(np.float32) * np.float32(2.0**112)).view(np.uint32)
            special = np.uint32(rest | np.uint32(0x7F800000))
            value = special if rest >= np.uint32(0x0F800000) else scaled
            return np.uint32(value | sign).view(np.float32)

        return float16
    return lambda bits: bits


def _narrow(value: Any, noise: Any, like: Any) -> Any:
    """Return a float as the dtype of ``like``; a short one is rounded away from zero with a probability: its rest."""


@overload(_narrow, strict=False)
def _overload_narrow(value: Any, noise: Any, like: Any) -> Any:
    if like == types.uint16:

        def bfloat16(value: Any, noise: Any, like: Any) -> Any:
            bits = np.float32(value).view(np.uint32)
            rounded = np.uint32(np.uint32(bits + np.uint32(noise & np.uint32(0xFFFF))) >> np.uint32(16))
            nan = np.uint32(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
            return np.uint16(nan if value != value else rounded)  # noqa: PLR0124 - NaN is what differs from itself

        return bfloat16
    if like == types.int16:

        def float16(value: Any, noise: Any, like: Any) -> Any:
            bits = np.float32(value).view(np.uint32)
            sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
            rest = np.uint32(bits & np.uint32(0x7FFFFFFF))
            normal = np.uint32(np.uint32(rest + np.uint32(noise & np.uint32(0x1FFF))) >> np.uint32(13))
            # What is nearest to the largest finite value stays it; from there on all is infinity.
            normal = min(normal, np.uint32(0x23BFF)) if rest < np.uint32(0x477FF000) else np.uint32(0x23C00)
            normal = np.uint32(normal - np.uint32(0x1C000))
            # Below 2**-14 all steps are 2**-24: in fixed point, with 16 bits for what is below a step.
            fixed = np.uint32(
                np.int32(min(np.uint32(rest).view(np.float32), np.float32(2.0**-14)) * np.float32(2.0**40))
            )
            subnormal = np.uint32(np.uint32(fixed + np.uint32(noise & np.uint32(0xFFFF))) >> np.uint32(16))
            finite = subnormal if rest < np.uint32(0x38800000) else normal
            return np.int16(np.uint32(sign | (np.uint32(0x7E00) if rest > np.uint32(0x7F800000) else finite)))

        return float16
    return lambda value, noise, like: value


def _noise(seed: Any, place: Any) -> Any:
    bits = np.uint32(seed ^ np.uint32(np.uint32(place) * np.uint32(0x9E3779B9)))
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> np.uint32(16))) * _ROUNDS[0])
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> np.uint32(15))) * _ROUNDS[1])
    return np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))


def _noise_for(seed: Any, place: Any, like: Any) -> Any:
    """Return 32 random bits where ``like`` is a short dtype, else nothing at no cost."""


_noise = jit(inline="always")(_noise)


@overload(_noise_for, strict=False)
def _overload_noise_for(seed: Any, place: Any, like: Any) -> Any:
    if like in {types.uint16, types.int16}:
        return lambda seed, place, like: _noise(seed, place)
    return lambda seed, place, like: np.uint32(0)


@jit()
def _move_piece(average: Any, weight: Any, rate: Any, seed: Any) -> None:
    # As torch's lerp, from the nearer end; the sum is made in the type of the rate.
    wide = type(rate)
    if abs(rate) < wide(0.5):
        for i in range(average.size):
            old, new = wide(_wide(average[i])), wide(_wide(weight[i]))
            value: Any = add_product(rate, new - old, old)
            average[i] = _narrow(value, _noise_for(seed, i, average[i]), average[i])
    else:
        back = rate - wide(1)
        for i in range(average.size):
            old, new = wide(_wide(average[i])), wide(_wide(weight[i]))
            value = add_product(back, new - old, new)
            average[i] = _narrow(value, _noise_for(seed, i, average[i]), average[i])


def finite(value: Any) -> Any:
    """Return whether a float of any of the types above is finite."""


@overload(finite, strict=False)
def _overload_finite(value: Any) -> Any:
    if value in _EXPONENTS:
        exponent = _EXPONENTS[value]
        return lambda value: (np.uint16(value) & exponent) != exponent
    return lambda value: value - value == type(value)(0)


@jit()
def _hold_piece(average: Any, weight: Any, rate: Any, seed: Any) -> int:
    """Move a piece as ``_move_piece``, but for elements that would not be finite; return how many these are."""
    wide = type(rate)
    near = abs(rate) < wide(0.5)
    factor = rate if near else rate - wide(1)
    held = np.uint32(0)
    for i in range(average.size):
        kept = average[i]
        old, new = wide(_wide(kept)), wide(_wide(weight[i]))
        value: Any = add_product(factor, new - old, old if near else new)
        moved = _narrow(value, _noise_for(seed, i, kept), kept)
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
            moved = _narrow(wide(_wide(weight[i])), _noise_for(seed, i, kept), kept)
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
                held[lane, piece] = _hold_piece(target, source, rates[lane], _noise(seed[lane], piece))
            else:
                _move_piece(target, source, rates[lane], _noise(seed[lane], piece))
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
