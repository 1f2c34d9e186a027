"""What names in a checkpoint's pickle stand for: tensors and plain containers; all others are inert."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Global", "Instance", "Memory", "Opaque", "Saved", "View", "dtype_of_storage", "meaning"]

Saved = Any
"""Whatever a pickle describes."""

_HUGE = 2**62
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8, "_UntypedStorage": torch.uint8,
}  # fmt: skip
_DIMENSIONS = 64
_NUMBER = re.compile(r"[<|=]?[biuf][1248]")


class Global(NamedTuple):
    """The name of a class or a function, which is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Instance:
    """What would have been an object of a class that is not on the list: its name, arguments and state."""

    of: Global
    args: tuple[Any, ...] = ()
    state: Saved = None
    items: list[Any] = field(default_factory=list)


class Opaque(NamedTuple):
    """A tensor that is no plain one: quantised, sparse, sharded, without values."""

    kind: str


class Memory(NamedTuple):
    """A storage: what tensors may share. ``part`` is an offset in values, of old files only."""

    key: str
    dtype: torch.dtype
    numel: int
    part: int = 0


class View(NamedTuple):
    """A tensor as a view of a storage."""

    memory: Memory
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def meaning(called: Saved, args: Saved) -> Saved:
    """Return the value that a call stands for, without calling it.

    Raises:
        ValueError: If it is damaged.
    """
    if not isinstance(called, Global) or not isinstance(args, (tuple, list)):
        message = f"its pickle calls {shown(called)}"
        raise ValueError(message)  # noqa: TRY004 - a damaged file
    make = _MEANINGS.get(str(called).replace("numpy._core.", "numpy.core."))
    return Instance(called, tuple(args)) if make is None else make(*args)


def dtype_of_storage(kind: Saved) -> torch.dtype:
    """Return the dtype of a storage by the name of its class.

    Raises:
        ValueError: If it is none.
    """
    name = kind.name if isinstance(kind, Global) and kind.module in {"torch", "torch.storage", "torch.cuda"} else ""
    if name not in _STORAGES:
        message = f"{shown(kind)} is no storage of a tensor"
        raise ValueError(message)
    return _STORAGES[name]


def _view(
    memory: Saved, offset: Saved, shape: Saved, stride: Saved, *_: Saved, dtype: torch.dtype | None = None
) -> View | Opaque:
    if isinstance(memory, Opaque):
        return memory
    sizes, steps = tuple(shape), tuple(stride)
    whole = all(type(n) is int and 0 <= n < _HUGE for n in (offset, *sizes, *steps))
    if (
        not whole
        or len(sizes) != len(steps)
        or len(sizes) > _DIMENSIONS
        or math.prod(max(1, n) for n in sizes) >= _HUGE
    ):
        message = f"a tensor has shape {shown(sizes)} and stride {shown(steps)}"
        raise ValueError(message)
    kind = memory.dtype if dtype is None else dtype
    end = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) + 1 if math.prod(sizes) else offset
    if end * kind.itemsize > memory.numel * memory.dtype.itemsize:
        message = f"a tensor of shape {shown(sizes)} reaches behind the end of its storage"
        raise ValueError(message)
    return View(memory, kind, offset + memory.part, sizes, steps)


def _view_of_dtype(
    memory: Saved, offset: Saved, shape: Saved, stride: Saved, _: Saved, __: Saved, dtype: Saved, *___: Saved
) -> View | Opaque:
    kind = getattr(torch, dtype.name, None) if isinstance(dtype, Global) and dtype.module == "torch" else None
    if not isinstance(kind, torch.dtype):
        return Opaque(f"of the dtype {shown(dtype)}")
    return _view(memory, offset, shape, stride, dtype=kind)


def _of_type(function: Saved, kind: Saved, args: Saved, *_: Saved) -> Saved:
    made = meaning(function, args)
    return Opaque(f"of the class {kind}") if isinstance(made, Instance) else made


def _dictionary(*args: Saved) -> dict[Any, Any]:
    pairs = args[-1] if args and isinstance(args[-1], (dict, list, tuple)) else ()
    items: Saved = pairs.items() if isinstance(pairs, dict) else pairs
    return {key: value for key, value in items if isinstance(key, (str, int))}


def _sequence(*args: Saved) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], (list, tuple)) else []


def _scalar(dtype: Saved, data: Saved = b"") -> Saved:
    code = dtype.args[0] if isinstance(dtype, Instance) and dtype.args else None
    if isinstance(code, str) and isinstance(data, bytes) and _NUMBER.fullmatch(code):
        values = np.frombuffer(data, np.dtype(code))
        return values[0].item() if values.size == 1 else None
    return None


def _encoded(text: Saved, *_: Saved) -> bytes:
    return text.encode("latin-1", "replace") if isinstance(text, str) else b""


def _opaque(kind: str) -> Callable[..., Opaque]:
    return lambda *_: Opaque(kind)


_MEANINGS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_qtensor": _opaque("quantised"),
    "torch._utils._rebuild_sparse_tensor": _opaque("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _opaque("sparse"),
    "torch._utils._rebuild_nested_tensor": _opaque("nested"),
    "torch._utils._rebuild_wrapper_subclass": _opaque("of a subclass without memory, such as DTensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _opaque("on the device 'meta', without values"),
    "torch._utils._rebuild_device_tensor_from_numpy": _opaque("of another device, saved as an array"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
    "torch.Size": lambda *sizes: tuple(sizes[0]) if sizes else (),
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    "collections.Counter": _dictionary,
    "builtins.dict": _dictionary,
    "builtins.list": _sequence,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "__builtin__.set": _sequence,
    "__builtin__.frozenset": _sequence,
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _scalar,
}
