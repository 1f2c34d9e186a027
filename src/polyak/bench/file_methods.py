"""One sample of one method: ``python -m polyak.bench.file_methods METHOD hot|cold OUT FILES``."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["METHODS"]

_PIECE = 1 << 20


def _read(paths: Sequence[Path], _: Path) -> None:
    buffer = bytearray(_PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _load_all(paths: Sequence[Path], out: Path) -> None:
    states = [_loaded(path) for path in paths]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    _save(mean, out)


def _one_at_a_time(paths: Sequence[Path], out: Path) -> None:
    total = {name: tensor.clone() for name, tensor in _loaded(paths[0]).items()}
    for path in paths[1:]:
        for name, tensor in _loaded(path).items():
            total[name] += tensor
    _save({name: tensor.div_(len(paths)) for name, tensor in total.items()}, out)


def _polyak(paths: Sequence[Path], out: Path) -> None:
    from polyak.files import average

    average(paths, out=out, hashes=False)


def _polyak_hashed(paths: Sequence[Path], out: Path) -> None:
    from polyak.files import average

    average(paths, out=out)


METHODS: dict[str, Callable[[Sequence[Path], Path], None]] = {
    "read": _read,
    "load all": _load_all,
    "one at a time": _one_at_a_time,
    "polyak": _polyak,
    "polyak, sha256": _polyak_hashed,
}
"""Names to methods."""


def _loaded(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".pt":
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    from safetensors.torch import load_file

    return load_file(path)


def _save(state: dict[str, Tensor], out: Path) -> None:
    if out.suffix == ".pt":
        torch.save(state, out)
        return
    from safetensors.torch import save_file

    save_file(state, out)


def _peak() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _processors() -> float:
    """Return for how many seconds processors have worked for anyone, NaN where Linux does not say it."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return math.nan
    user, nice, system, _, _, *rest = map(int, counters.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _main() -> None:
    method, state, out, *files = sys.argv[1:]
    import polyak.files  # noqa: F401 - so that it is in memory before

    torch.zeros(10).double().add_(1)
    paths = [Path(file) for file in files]
    if state == "cold" and hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, worked, own = _peak(), _processors(), time.process_time()
    started = time.perf_counter()
    METHODS[method](paths, Path(out))
    seconds = time.perf_counter() - started
    others = (_processors() - worked - (time.process_time() - own)) / (seconds * (os.cpu_count() or 1))
    found = {"seconds": seconds, "peak": _peak() - before, "others": others if others == others else 0.0}  # noqa: PLR0124 - NaN
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main()
