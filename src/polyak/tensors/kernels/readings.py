"""Where tensors are and how they are laid out, asked of torch in one compiled loop (``pip install "polyak[fast]"``).

What answers are functions of its stable C interface, which compiled models call, too. They take the address of an
``at::Tensor``. Every tensor of Python holds one; that it is where it is looked for is verified.
"""

from __future__ import annotations

import ctypes
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Readings"]

_NUMBERS = ("dim", "dtype", "device_type", "device_index", "data_ptr")
_LISTS = ("sizes", "strides")  # of as many numbers as there are dimensions


class Readings:
    """Remembers the layout and the address of each tensor.

    Args:
        tensors: Dense tensors, of no subclass.

    Raises:
        AttributeError: This torch has no such interface.
        OSError: It cannot be loaded.
        ValueError: Its tensors are made otherwise.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        from polyak.tensors.kernels import compiled_readings

        self._loops = compiled_readings
        self._tensors = list(tensors)  # handles are good for as long as these live
        self._handles = np.array([*map(id, tensors)], np.uint64) + np.uint64(_offset())
        implementations = np.array([*map(attrgetter("_cdata"), tensors)], np.uint64)
        if not np.array_equal(self._loops.words(self._handles), implementations):
            message = "the tensors hold no at::Tensor where another one does"
            raise ValueError(message)
        self._dims = np.array([tensor.dim() for tensor in tensors], np.int64)
        self._known = np.zeros(len(_NUMBERS) * len(tensors) + len(_LISTS) * int(self._dims.sum()), np.int64)
        self._answer, self._functions = np.zeros(1, np.int64), _functions()
        self._noted = False
        self.note()

    def same(self) -> bool:
        """Return whether all are as they were when they were noted last."""
        return self._noted and self._read(note=False)

    def note(self) -> None:
        """Note how all are now."""
        self._noted = self._read(note=True)

    def _read(self, *, note: bool) -> bool:
        answer = self._answer
        return bool(
            self._loops.read(self._functions, self._handles, self._dims, self._known, answer, answer.ctypes.data, note)
        )


@cache
def _functions() -> NDArray[np.uint64]:
    library = ctypes.CDLL(torch._C.__file__)  # noqa: SLF001 - they are in what it is linked with
    found = [getattr(library, f"aoti_torch_get_{name}") for name in (*_NUMBERS, *_LISTS)]
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in found], np.uint64)


@cache
def _offset() -> int:
    """Return where in a tensor of Python the pointer is that an ``at::Tensor`` consists of."""
    tensor = torch.empty(1)
    held = (ctypes.c_uint64 * (type(tensor).__basicsize__ // 8)).from_address(id(tensor))
    return 8 * [*held].index(tensor._cdata)  # noqa: SLF001 - torch has no public way to ask
