"""What a float is to compiled loops: widened, narrowed at random, and whether it is finite.

Numba knows neither bfloat16 nor float16, so their bits travel as uint16 and as int16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from polyak.kernels.cpu.cache import jit

__all__ = ["finite", "mixed", "narrowed", "noise_for", "widened"]

_EXPONENTS = {types.uint16: np.uint16(0x7F80), types.int16: np.uint16(0x7C00)}
"""The bits of the exponent of short floats, all set in what is not finite."""
_ROUNDS = (np.uint32(0x7FEB352D), np.uint32(0x846CA68B))  # lowbias32, a public-domain hash of 32 bits


def widened(bits: Any) -> Any:
    """Return the float that some bits mean, in at least 32 bits."""


@overload(widened, strict=False)
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


def narrowed(value: Any, noise: Any, like: Any) -> Any:
    """Return a float as the dtype of ``like``; a short one is rounded away from zero with a probability: its rest."""


@overload(narrowed, strict=False)
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


def mixed(seed: Any, place: Any) -> Any:
    """Return 32 bits that a seed and a place make."""
    bits = np.uint32(seed ^ np.uint32(np.uint32(place) * np.uint32(0x9E3779B9)))
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> np.uint32(16))) * _ROUNDS[0])
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> np.uint32(15))) * _ROUNDS[1])
    return np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))


def noise_for(seed: Any, place: Any, like: Any) -> Any:
    """Return 32 random bits where ``like`` is a short dtype, else nothing at no cost."""


mixed = jit(inline="always")(mixed)


@overload(noise_for, strict=False)
def _overload_noise_for(seed: Any, place: Any, like: Any) -> Any:
    if like in {types.uint16, types.int16}:
        return lambda seed, place, like: mixed(seed, place)
    return lambda seed, place, like: np.uint32(0)


def finite(value: Any) -> Any:
    """Return whether a float of any of the types above is finite."""


@overload(finite, strict=False)
def _overload_finite(value: Any) -> Any:
    if value in _EXPONENTS:
        exponent = _EXPONENTS[value]
        return lambda value: (np.uint16(value) & exponent) != exponent
    return lambda value: value - value == type(value)(0)
