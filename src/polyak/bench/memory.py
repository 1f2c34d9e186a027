"""How much memory a call needs in addition to what is already in use, to about one megabyte."""

from __future__ import annotations

import os
import tracemalloc
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Use", "available", "method", "peak", "use"]


class Use(NamedTuple):
    """Bytes above what was used before the call: at its worst moment, and by what it returned."""

    peak: int
    kept: int


def method(device: torch.device) -> str:
    """Return how memory is measured for a device, in words; "" where it cannot be."""
    if device.type == "cpu":
        return "what torch allocates, from its profiler, and what Python allocates, from tracemalloc"
    return f"torch.{device.type}.max_memory_allocated" if _counted(device) else ""


def use(call: Callable[[], object], device: torch.device) -> Use | None:
    """Return the memory a call uses, or None if it cannot be measured. Its result is dropped."""
    if device.type != "cpu":
        return _on_accelerator(call, device) if _counted(device) else None
    tensors, objects = _of_torch(call), _of_python(call)
    # The two peaks need not be at the same moment: their sum is the most that it can have been.
    return Use(tensors.peak + objects.peak, tensors.kept + objects.kept)


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of a call, or None if it cannot be measured."""
    used = use(call, device)
    return None if used is None else used.peak


def available(device: torch.device) -> int | None:
    """Return the bytes that are free; None where the device does not say."""
    if device.type != "cpu":
        query = getattr(getattr(torch, device.type, None), "mem_get_info", None)
        return None if query is None else int(query(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _of_torch(call: Callable[[], object]) -> Use:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to the terminal that there is no GPU
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    levels = [0, *accumulate(event.nbytes() for event in changes)]
    del made
    return Use(max(levels), max(levels[-1], 0))


def _of_python(call: Callable[[], object]) -> Use:
    tracemalloc.start()
    try:
        made = call()
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del made
    return Use(most, kept)


def _on_accelerator(call: Callable[[], object], device: torch.device) -> Use:
    backend = getattr(torch, device.type)
    backend.synchronize(device)
    backend.reset_peak_memory_stats(device)
    before = backend.memory_allocated(device)
    made = call()
    backend.synchronize(device)
    most, kept = backend.max_memory_allocated(device), backend.memory_allocated(device)
    del made
    return Use(most - before, kept - before)


def _counted(device: torch.device) -> bool:
    return hasattr(getattr(torch, device.type, None), "reset_peak_memory_stats")
