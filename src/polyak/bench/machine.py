"""What the benchmark runs on, without dates and names of people or hosts."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from polyak.bench.libraries import LIBRARIES

__all__ = ["machine", "versions"]

_CPU = Path("/proc/cpuinfo")


def machine(device: torch.device) -> str:
    """Return the machine in one line."""
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    accelerator = "" if named is None else f"{named(device)}, "
    threads = torch.get_num_threads()
    return (
        f"{accelerator}{_processor()} ({os.cpu_count()} cores), {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def versions() -> dict[str, str]:
    """Return the versions of what took part, as far as it is installed."""
    others = ("torchvision", "numba", "triton")
    found = {}
    for name in dict.fromkeys(["polyak", *(library.distribution for library in LIBRARIES.values()), *others]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = _CPU.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
