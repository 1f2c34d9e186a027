"""Ctrl-C at a chosen moment: before or after the k-th tensor operation, or at the k-th line of chosen files."""

from __future__ import annotations

import dis
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType, ModuleType


class AtOperation(TorchFunctionMode):
    """Raises KeyboardInterrupt once, before or after the k-th call into torch; with k=None it only counts.

    Calls into torch are C++ and are never interrupted in the middle: Python acts on Ctrl-C between them.
    """

    def __init__(self, k: int | None = None, when: str = "before") -> None:
        super().__init__()
        self.seen = 0
        self._k, self._when = k, when

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        hit = self.seen - 1 == self._k
        if hit and self._when == "before":
            raise KeyboardInterrupt
        result = function(*args, **(kwargs or {}))
        if hit:
            raise KeyboardInterrupt
        return result


@cache
def _exits(code: CodeType) -> frozenset[int]:
    """Return where the calls of ``__exit__(None, None, None)`` begin that end a with block."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "PRECALL", "NOP"}]
    nones = [step.opname in {"LOAD_CONST", "LOAD_COMMON_CONSTANT"} and step.argval is None for step in steps]
    return frozenset(
        step.offset
        for number, step in enumerate(steps[:-3])
        if all(nones[number : number + 3]) and steps[number + 3].opname == "CALL"
    )


@contextmanager
def at_line(modules: tuple[ModuleType | Path, ...], k: int | None = None) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt once, at the k-th line that is run in these modules or folders; yields the lines seen.

    The line of a with statement is run again when its block ends, before ``__exit__``: Python acts on no Ctrl-C there,
    and an exception would leave a lock taken for all tests that follow. Nor does anything come out of ``__del__``.
    """
    files = tuple(str(module) if isinstance(module, Path) else str(module.__file__) for module in modules)
    seen: list[str] = []

    def local(frame: FrameType, event: str, _: object):
        if event == "line" and frame.f_lasti not in _exits(frame.f_code):
            seen.append(f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
            if len(seen) - 1 == k:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def tracer(frame: FrameType, event: str, arg: object):
        dying = any(one.f_code.co_name == "__del__" for one in (frame, frame.f_back) if one is not None)
        return local if frame.f_code.co_filename.startswith(files) and not dying else None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield seen
    finally:
        sys.settrace(before)
