"""The loops that ask torch about many tensors, compiled by Numba on first use and cached on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import carray, types
from numba.extending import intrinsic

from polyak.tensors.kernels.compiled import fetch, jit, pointer

__all__ = ["read", "words"]

_AHEAD = 5  # places: memory takes so much longer than a look at what came from it
_LINES = (0, 64, 128, 168)  # bytes from the beginning of what a tensor is made of, in each line that is looked at


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
def read(
    functions: Any, handles: Any, bodies: Any, storages: Any, dims: Any, known: Any, answer: Any, place: int
) -> bool:
    """Return whether each tensor answers as is known; else note what it answers.

    Args:
        functions: Addresses of functions of a tensor: its dimensions, other numbers; at last its sizes and its strides.
        handles: Of the tensors.
        bodies: Where the answers probably come from: the memory a tensor is made of.
        storages: The same of its storage.
        dims: How many dimensions each has, for which there is room in ``known``; others answer nothing.
        known: All answers, one after the other.
        answer: One number, written by the functions.
        place: Its address.
    """
    k, numbers, equal = 0, len(functions) - 2, True
    for i in range(len(handles)):
        if i + _AHEAD < len(handles):
            fetch(handles[i + _AHEAD])
            for line in _LINES:
                fetch(bodies[i + _AHEAD] + np.uint64(line))
            fetch(storages[i + _AHEAD])
        for f in range(len(functions)):
            answer[0] = 0  # some write half a word
            if _ask(functions[f], handles[i], place) != 0 or (f == 0 and answer[0] != dims[i]):
                known[:] = -1  # it answers nothing: what is known of those behind it may be long ago
                return False
            count = 1 if f < numbers else dims[i]
            found = carray(pointer(place if f < numbers else answer[0], answer), (count,))
            for j in range(count):
                if known[k] != found[j]:
                    known[k], equal = found[j], False
                k += 1
    return equal
