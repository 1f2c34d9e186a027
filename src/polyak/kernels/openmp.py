"""The threads that torch computes with, lent for other work.

After each call these spin for some milliseconds, since another call may follow. Other threads would compete for the
cores meanwhile, and wait for them longer than small models need for an update.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["on_team"]

_FORKED: list[bool] = []
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def on_team(work: Callable[[], None], threads: int) -> bool:
    """Run some work once on each of torch's threads, this one among them; return False where they cannot be had.

    Raises:
        BaseException: What the work raised on any of the threads; the others have finished then.
    """
    run = None if _FORKED else _parallel()
    if run is None:
        return False
    raised: list[BaseException] = []
    begun: list[int] = []

    def region(_: object) -> None:
        try:
            begun.append(get_ident())
            work()
        except BaseException as error:  # noqa: BLE001 - no exception passes through compiled code: it is raised behind it
            raised.append(error)

    run(_REGION(region), None, threads, 0)
    if raised:
        raise raised[0]
    if get_ident() not in begun:  # Ctrl-C struck before the first line of the region, where nothing could catch it
        raise KeyboardInterrupt
    return True


@cache
def _parallel() -> Callable[..., object] | None:
    """Return GNU OpenMP's entry of a parallel region, in the very library that torch has loaded; None without one."""
    if sys.platform != "linux":
        return None
    beside = [*map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))]
    for name in (*beside, "libgomp.so.1"):
        with suppress(OSError, AttributeError):
            parallel = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            parallel.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel
    return None


if hasattr(os, "register_at_fork"):
    # The library believes that the parent's threads are here, and would wait for them for ever.
    os.register_at_fork(after_in_child=lambda: _FORKED.append(True))
