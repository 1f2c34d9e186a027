"""Memory that does not grow with the files, and Ctrl-C that leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import polyak
from interrupts import at_line
from polyak import files

MOST = 64  # MiB above an interpreter with torch
PEAK = """
import sys
import torch
from polyak import files

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

torch.zeros(10).double().add_(1)
before = peak()
files.average(sys.argv[2:], out=sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("count", [3, 20])
def test_memory_is_bounded_whatever_the_size(suffix, count, tmp_path):
    size = 120_000_000 // count  # 480 MB of inputs
    for number in range(count):
        state = {"a": torch.full((size // 2, 2), float(number)), "b": torch.ones(3)}
        path = tmp_path / f"{number}.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    names = [str(tmp_path / f"{number}.{suffix}") for number in range(count)]
    command = [sys.executable, "-c", PEAK, str(tmp_path / f"o.{suffix}"), *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < MOST
    with files.open(tmp_path / f"o.{suffix}") as checkpoint:
        assert checkpoint.read("a", 0, 5).eq((count - 1) / 2).all()


MERGE = PEAK.replace(
    "files.average(sys.argv[2:], out=sys.argv[1])",
    "files.merge(sys.argv[3:], sys.argv[2], base=sys.argv[3].replace('0.', 'base.'), out=sys.argv[1])",
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "method", ["ties", "model_stock", "breadcrumbs", "magnitude_prune", "task_arithmetic", "della"]
)
def test_whole_tensor_merges_hold_one_tensor_of_each_input(method, tmp_path):
    size = 10_000_000
    for name in ("0", "1", "2", "base"):
        save_file({"w": torch.randn(size), "b": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    names = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    command = [sys.executable, "-c", MERGE, str(tmp_path / "o.safetensors"), method, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # What is streamed holds a piece of each of four inputs, in float64.
    tensors = 0 if method == "task_arithmetic" else 3 + 2
    assert float(done.stdout) < 2 * MOST + tensors * size * 8 / 2**20


def test_ctrl_c_leaves_nothing_wherever_it_comes(run, tmp_path, left):
    out = tmp_path / "o.safetensors"
    folder = Path(polyak.__file__).parent / "files"
    files.average(run, out=out)  # imports what only the first call does
    out.unlink()
    with at_line((folder,)) as lines:
        files.average(run, out=out)
    out.unlink()
    before = left()
    for k in range(0, len(lines), max(1, len(lines) // 150)):
        with pytest.raises(KeyboardInterrupt), at_line((folder,), k):
            files.average(run, out=out)
        assert left() in (before, sorted([*before, out.name]))
        out.unlink(missing_ok=True)


def test_a_file_that_changes_while_it_is_read_is_told(run, tmp_path, left):
    with files.open(run[0]) as checkpoint:
        run[0].write_bytes(run[0].read_bytes()[:-1000])
        with pytest.raises(polyak.errors.StateError, match="cut off while it was read"):
            checkpoint.read(checkpoint.names[-1])
