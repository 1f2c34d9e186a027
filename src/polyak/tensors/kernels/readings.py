"""Whether dictionaries changed, and whether tensors lie as they did: a few passes over memory.

Of dictionaries a version is read, where Python keeps one (before 3.14). Of tensors functions of torch's stable C
interface answer, which compiled models call, too, in a compiled loop (``pip install "polyak[fast]"``). They take the
address of an ``at::Tensor``, which every tensor of Python holds. That each is where it is looked for is verified.
"""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Contents", "Layouts", "contents_of", "layouts_of"]

_NUMBERS = ("dim", "dtype", "device_type", "device_index", "data_ptr")
_LISTS = ("sizes", "strides")  # of as many numbers as there are dimensions
_VERSION = 24  # bytes from the beginning of a dictionary: behind its count of references, its type and its size


class _Readings(ABC):
    """Remembers what was read last, which counts once it is confirmed."""

    def __init__(self) -> None:
        self._confirmed = False

    def same(self) -> bool:
        """Return whether all is as it was when it was confirmed; if not, confirm what was read now by ``confirm``."""
        same = self._read() and self._confirmed
        self._confirmed = same
        return same

    def confirm(self) -> None:
        """Let what was read last count: somebody has looked, and it is the model's."""
        self._confirmed = True

    @abstractmethod
    def _read(self) -> bool:
        """Return whether all reads as it did last, and remember how it reads."""


class Contents(_Readings):
    """Notices every change of some dictionaries by their version, which Python changes at each write (PEP 509).

    Args:
        dicts: The dictionaries.

    Raises:
        ValueError: This Python keeps no versions, or one is of a subclass.
    """

    def __init__(self, dicts: Sequence[Mapping[str, object]]) -> None:
        super().__init__()
        if not ({*map(type, dicts)} == {dict} and _versioned()):
            message = "the dictionaries have no versions"
            raise ValueError(message)
        self._dicts = list(dicts)  # addresses are good for as long as these live
        places = np.sort([*map(id, dicts)])
        first, last = int(places.min()), int(places.max())
        word = ctypes.c_uint64
        # All memory from the first to the last of them, of which nothing but their versions is read.
        between = (word * ((last - first) // ctypes.sizeof(word) + 1)).from_address(first + _VERSION)
        self._memory, self._which = np.ctypeslib.as_array(between), (places - first) // ctypes.sizeof(word)
        self._known = b""

    @override
    def _read(self) -> bool:
        then, self._known = self._known, self._memory[self._which].tobytes()
        return then == self._known


class Layouts(_Readings):
    """Remembers the layout and the address of each tensor.

    Args:
        tensors: Dense tensors, of no subclass.

    Raises:
        AttributeError: This torch has no such interface.
        OSError: It cannot be loaded.
        ValueError: Its tensors are made otherwise.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        from polyak.tensors.kernels import compiled_readings as loops

        super().__init__()
        self._read_all = loops.read
        self._tensors = list(tensors)  # handles are good for as long as these live
        handles = np.array([*map(id, tensors)], np.uint64) + np.uint64(_offset())
        bodies = np.array([*map(attrgetter("_cdata"), tensors)], np.uint64)
        if not np.array_equal(loops.words(handles), bodies):
            message = "the tensors hold no at::Tensor where another one does"
            raise ValueError(message)
        dims = np.array([tensor.dim() for tensor in tensors], np.int64)
        known = np.zeros(len(_NUMBERS) * len(tensors) + len(_LISTS) * int(dims.sum()), np.int64)
        answer = np.zeros(1, np.int64)
        storages = loops.words(bodies + np.uint64(_storage_offset()))
        self._work = _functions(), handles, bodies, storages, dims, known, answer, answer.ctypes.data

    @override
    def _read(self) -> bool:
        return bool(self._read_all(*self._work))


def contents_of(dicts: Sequence[Mapping[str, object]]) -> Contents | None:
    """Return what notices changes of dictionaries; None where that cannot be had."""
    try:
        return Contents(dicts)
    except ValueError:
        return None


def layouts_of(tensors: Sequence[Tensor]) -> Layouts | None:
    """Return what compares the layouts and addresses of dense tensors at once; None where that cannot be had."""
    try:
        return Layouts(tensors)
    except (AttributeError, OSError, ValueError):
        return None


@cache
def _versioned() -> bool:
    """Return whether there is a word in a dictionary that changes at each write, and never else."""
    writes: list[Callable[[dict[str, int]], object]] = [
        lambda d: d.__setitem__("a", 1),
        lambda d: d.__setitem__("b", 2),
        lambda d: d.__setitem__("a", 3),
        lambda d: d.pop("a"),
        lambda d: d.update(b=4),
        lambda d: d.setdefault("c", 5),
        lambda d: d.__delitem__("b"),
        lambda d: d.popitem(),
        lambda d: d.clear(),
        lambda d: d.__ior__({"b": 4}),
    ]
    tried: dict[str, int] = {"z": 0}
    if sys.implementation.name != "cpython" or tried.__sizeof__() < _VERSION + 8:
        return False
    version = ctypes.c_uint64.from_address(id(tried) + _VERSION)
    seen = [version.value]
    for write in writes:
        write(tried)
        seen.append(version.value)
        if (len(tried), tried.get("b"), [*tried.items()]) and version.value != seen[-1]:
            return False
    return len({*seen}) == len(seen)


@cache
def _functions() -> NDArray[np.uint64]:
    library = ctypes.CDLL(torch._C.__file__)  # noqa: SLF001 - they are in what it is linked with
    found = [getattr(library, f"aoti_torch_get_{name}") for name in (*_NUMBERS, *_LISTS)]
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in found], np.uint64)


@cache
def _offset() -> int:
    """Return where in a tensor of Python the pointer is that an ``at::Tensor`` consists of."""
    tensor = torch.empty(1)
    return _place(tensor._cdata, id(tensor), type(tensor).__basicsize__ // 8)  # noqa: SLF001 - torch has no public way to ask


@cache
def _storage_offset() -> int:
    """Return where in what a tensor is made of the pointer to its storage is."""
    tensor = torch.empty(1)
    return _place(tensor.untyped_storage()._cdata, tensor._cdata, 8)  # noqa: SLF001 - as above


def _place(word: int, start: int, count: int) -> int:
    """Return how many bytes behind a place a word is, among so many; a ValueError says that it is none of them."""
    return 8 * [*(ctypes.c_uint64 * count).from_address(start)].index(word)
