"""The loops that ask torch about many tensors, compiled by Numba on first use and cached on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import carray, types
from numba.extending import intrinsic

from polyak.tensors.kernels.compiled import jit, pointer

__all__ = ["read", "words"]


@intrinsic
def _ask(_: Any, function: Any, handle: Any, place: Any) -> Any:
    """Call a function of a tensor that writes its answer to a place; return its error code."""
    signature = types.int32(function, handle, place)

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word, word]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), args[1:])

    return signature, generate


@jit()
def words(places: Any) -> Any:
    """Return the word of memory at each address."""
    found = np.empty_like(places)
    for i in range(len(places)):
        found[i] = carray(pointer(places[i], places), (1,))[0]
    return found


@jit(nogil=False)  # no other thread shall replace a tensor meanwhile
def read(functions: Any, handles: Any, dims: Any, known: Any, answer: Any, place: int, note: bool) -> bool:  # noqa: FBT001 - Numba knows positional arguments only
    """Return whether each tensor answers as is known, or note what it answers.

    Args:
        functions: Addresses of functions of a tensor: its dimensions, other numbers; at last its sizes and its strides.
        handles: Of the tensors.
        dims: How many dimensions each has, for which there is room in ``known``.
        known: All answers, one after the other.
        answer: One number, written by the functions.
        place: Its address.
        note: Whether ``known`` is written instead of compared.
    """
    k, numbers = 0, len(functions) - 2
    for i in range(len(handles)):
        for f in range(len(functions)):
            answer[0] = 0  # some write half a word
            if _ask(functions[f], handles[i], place) != 0 or (f == 0 and answer[0] != dims[i]):
                return False
            count = 1 if f < numbers else dims[i]
            found = carray(pointer(place if f < numbers else answer[0], answer), (count,))
            for j in range(count):
                if note:
                    known[k] = found[j]
                elif known[k] != found[j]:
                    return False
                k += 1
    return True
