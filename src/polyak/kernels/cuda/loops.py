"""The loops of the fused CUDA kernel, compiled by Triton on first use and cached on disk.

A program moves one block of one tensor. It sees memory as addresses, which it reads in ``table``: rows of int64, one
column for each tensor: its size, whether its addresses are multiples of 16 bytes, where the weight lies, and where the
average of each lane does.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # brings no types
import triton.language as tl  # type: ignore[import-untyped]  # brings no types

# mypy: disable-error-code="untyped-decorator"
# Triton's decorators have no types either.

__all__ = ["find", "move"]

_HALF = tl.constexpr(0.5)
_OVERFLOW = tl.constexpr(0x477FF000)  # 65520 as float32: from there on the nearest float16 is infinity
_INFINITY = tl.constexpr(0x7F800000)  # as float32
_NORMAL = tl.constexpr(0x38800000)  # the smallest normal float16, 2**-14, as float32


@triton.jit
def _noise(seed: tl.tensor, place: tl.tensor) -> tl.tensor:
    # lowbias32, a public-domain hash of 32 bits, as on the CPU: philox would take longer than the memory does.
    bits = seed.to(tl.uint32) ^ (place.to(tl.uint32) * 0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _to_bfloat16(value: tl.tensor, noise: tl.tensor) -> tl.tensor:
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + (noise & 0xFFFF)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > _INFINITY, (bits >> 16) | 0x40, rounded)


@triton.jit
def _to_float16(value: tl.tensor, noise: tl.tensor) -> tl.tensor:
    bits = value.to(tl.uint32, bitcast=True)
    rest = bits & 0x7FFFFFFF
    # What is nearest to the largest finite value stays it; from there on all is infinity.
    cut = tl.minimum((rest + (noise & 0x1FFF)) >> 13, 0x23BFF)
    normal = tl.where(rest < _OVERFLOW, cut, 0x23C00) - 0x1C000
    # Below 2**-14 all steps are 2**-24: in fixed point, with 16 bits for what is below a step.
    small = tl.where(rest < _NORMAL, rest, 0).to(tl.float32, bitcast=True)
    subnormal = ((small * 1099511627776.0).to(tl.uint32) + (noise & 0xFFFF)) >> 16
    finite = tl.where(rest < _NORMAL, subnormal, normal)
    return ((bits >> 16) & 0x8000) | tl.where(rest > _INFINITY, 0x7E00, finite)


@triton.jit
def _rounded(value: tl.tensor, noise: tl.tensor, short: tl.constexpr) -> tl.tensor:
    """Return one of the short floats beside a value, the farther with the probability of the discarded fraction."""
    if short == tl.bfloat16:  # noqa: SIM108 - Triton compiles both sides of an expression
        bits = _to_bfloat16(value, noise)
    else:
        bits = _to_float16(value, noise)
    return bits.to(tl.uint16).to(short, bitcast=True)


@triton.jit
def _nearest(value: tl.tensor, short: tl.constexpr) -> tl.tensor:
    """Return the nearest short float, of two the even one."""
    if short == tl.float16:
        return value.to(short)
    # Written out, since Triton's interpreter cuts off where a GPU rounds.
    odd = (value.to(tl.uint32, bitcast=True) >> 16) & 1
    return _to_bfloat16(value, 0x7FFF + odd).to(tl.uint16).to(short, bitcast=True)


@triton.jit
def _is_finite(value: tl.tensor) -> tl.tensor:
    wide = value if value.dtype == tl.float64 else value.to(tl.float32)
    return wide - wide == 0


@triton.jit
def _pointer(
    table: tl.tensor, place: tl.tensor, start: tl.tensor, kind: tl.constexpr, aligned: tl.constexpr
) -> tl.tensor:
    """Return where a block begins whose tensor's address stands at some place of the table."""
    pointer = tl.load(table + place).to(tl.pointer_type(kind)) + start
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _move_block(  # noqa: PLR0913, PLR0917 - Triton passes each by itself
    table: tl.tensor,
    count: tl.tensor,
    tensor: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    rates: tl.tensor,
    seeds: tl.tensor,
    lanes: tl.tensor,
    held: tl.tensor,
    counts: tl.tensor,
    average: tl.constexpr,
    weight: tl.constexpr,
    block: tl.constexpr,
    hold: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    place = tl.arange(0, block)
    inside = place < size
    new = tl.load(_pointer(table, 2 * count + tensor, start, weight, aligned) + place, mask=inside)
    for lane in range(lanes):
        target = _pointer(table, (3 + lane) * count + tensor, start, average, aligned) + place
        rate = tl.load(rates + lane)
        # The sum is made in the type of the rate, as torch's lerp makes it: from the nearer end.
        kept = tl.load(target, mask=inside)
        old, wide = kept.to(rate.dtype), new.to(rate.dtype)
        near = tl.abs(rate) < _HALF
        moved = tl.fma(tl.where(near, rate, rate - 1), wide - old, tl.where(near, old, wide))
        if hold:
            moved = tl.where(_is_finite(kept), moved, wide)
        # A rate of 1 copies: by a sum, a NaN in the average would stay.
        if average == rate.dtype:
            value = tl.where(rate == 1, wide, moved)
        else:
            noise = _noise(_noise(tl.load(seeds + lane), tl.program_id(0)), place)
            value = tl.where(rate == 1, _nearest(wide, average), _rounded(moved, noise, average))
        if hold:
            finite = _is_finite(value)
            value = tl.where(finite, value, kept)
            missing = tl.sum((inside & ~finite).to(tl.int32), axis=0)
            tl.store(counts + lane * tl.num_programs(0) + tl.program_id(0), missing)
            if missing > 0:
                tl.atomic_add(held + lane, missing.to(tl.int64))
        tl.store(target, value, mask=inside)


@triton.jit(do_not_specialize=["count", "lanes"])
def move(  # noqa: PLR0913, PLR0917 - as above
    tensors: tl.tensor,
    blocks: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    rates: tl.tensor,
    seeds: tl.tensor,
    lanes: tl.tensor,
    guard: tl.tensor,
    held: tl.tensor,
    counts: tl.tensor,
    average: tl.constexpr,
    weight: tl.constexpr,
    block: tl.constexpr,
    hold: tl.constexpr,
) -> None:
    """Move one block of a tensor in each lane: ``average += rate * (weight - average)``.

    Args:
        tensors: The number of each block's tensor.
        blocks: The number of each block within its tensor.
        table: Rows of a column for each tensor: sizes, whether aligned, weights, averages of each lane.
        count: How many tensors there are.
        rates: The rate of each lane, in the type the sum is made in.
        seeds: 32 random bits for each lane; read for short averages.
        lanes: How many lanes there are.
        guard: An int32; where it is not zero, nothing is moved.
        held: Where ``hold``, an int64 for each lane, to which the elements are added that keep their old value.
        counts: Where ``hold``, an int32 for each lane and block: how many these are in it.
        average: The type of the averages.
        weight: The type of the weights.
        block: Elements in a block, a power of two.
        hold: Whether elements whose new value would not be finite keep their old one.
    """
    tensor = tl.load(tensors + tl.program_id(0))
    start = tl.load(blocks + tl.program_id(0)).to(tl.int64) * block
    size = tl.where(tl.load(guard) == 0, tl.load(table + tensor) - start, 0)
    # A whole aligned block needs no mask, and is read 16 bytes at a time.
    if (size >= block) & (tl.load(table + count + tensor) != 0):
        _move_block(
            table,
            count,
            tensor,
            start,
            block,
            rates,
            seeds,
            lanes,
            held,
            counts,
            average,
            weight,
            block,
            hold,
            aligned=True,
        )
    else:
        _move_block(
            table,
            count,
            tensor,
            start,
            size,
            rates,
            seeds,
            lanes,
            held,
            counts,
            average,
            weight,
            block,
            hold,
            aligned=False,
        )


@triton.jit
def _find_in_block(
    table: tl.tensor,
    count: tl.tensor,
    tensor: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    found: tl.tensor,
    like: tl.constexpr,
    exponent: tl.constexpr,
    block: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    place = tl.arange(0, block)
    source = _pointer(table, 2 * count + tensor, start, like, aligned) + place
    bits = tl.load(source, mask=place < size, other=0)
    if tl.max(((bits & exponent) == exponent).to(tl.int32), axis=0) > 0:
        tl.store(found, 1)


@triton.jit(do_not_specialize=["count"])
def find(
    tensors: tl.tensor,
    blocks: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    found: tl.tensor,
    like: tl.constexpr,
    exponent: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write 1 to ``found`` where an element of a block of weights has all bits of exponent set, else write nothing.

    Args:
        tensors: The number of each block's tensor.
        blocks: The number of each block within its tensor.
        table: Rows of a column for each tensor: sizes, whether aligned, weights.
        count: How many tensors there are.
        found: An int32.
        like: A type of integers as long as the weights' floats.
        exponent: The bits of the exponent, all set in what is not finite.
        block: Elements in a block, a power of two.
    """
    tensor = tl.load(tensors + tl.program_id(0))
    start = tl.load(blocks + tl.program_id(0)).to(tl.int64) * block
    size = tl.load(table + tensor) - start
    if (size >= block) & (tl.load(table + count + tensor) != 0):
        _find_in_block(table, count, tensor, start, block, found, like, exponent, block, aligned=True)
    else:
        _find_in_block(table, count, tensor, start, size, found, like, exponent, block, aligned=False)
