"""Files under stress: processes killed while they write, full disks, and the memory that synthesis takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import polyak
from polyak import StateError
from polyak.posthoc import Recorder, Store, synthesize
from posthoc.runs import counted, quietly, without_checksums

KILLED = """
import os, random, signal, sys, time
import torch, polyak
from polyak.posthoc import Recorder
torch.set_num_threads(1)

def write(folder, ready, end=None):
    model = {"w": torch.zeros(60_000, dtype=torch.float64)}
    averager = polyak.average(model, "swa")
    with Recorder(averager, folder, every=2):
        step = 0
        while step != end:
            step += 1
            model["w"].fill_(step)
            averager.update()
            if step == 4:
                os.write(ready, b"!")

chance = random.Random(0)
write(sys.argv[1] + " before", None, 3)  # what is compiled at first is ready before the others begin
for folder in sys.argv[1:]:
    heard, ready = os.pipe()
    process = os.fork()
    if not process:
        write(folder, ready)
    os.read(heard, 1)
    time.sleep(chance.uniform(0.0, 0.05))
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
"""

LIMITED = """
import resource, sys, torch, polyak
from polyak.posthoc import Recorder
model = {"w": torch.zeros(50_000)}
averager, alone = polyak.average(model, "swa"), polyak.average(model, "swa")
failed = []
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Recorder(averager, sys.argv[1], every=10):
    for step in range(1, 61):
        limit(100_000 if 15 <= step < 45 else resource.RLIM_INFINITY)
        model["w"].fill_(step)
        alone.update()
        try:
            averager.update()
        except OSError as error:
            assert isinstance(error, polyak.SnapshotError), error
            failed.append(step)
assert torch.equal(averager.averages["w"], alone.averages["w"])
assert averager.n == 60
print(failed)
"""

MEASURED = """
import sys, torch
from polyak.posthoc import synthesize
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
def now():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024
torch.set_num_threads(1)
synthesize(sys.argv[1], "swa")  # whatever is imported, compiled or read into buffers the first time
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = now()
made = synthesize(sys.argv[2], "power", sigma_rel=0.12)
assert len(made.coefficients) >= 32, len(made.coefficients)
print(peak() - before, sum(t.nbytes for t in made.state_dict.values()))
"""


def run(source, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, and killed as POSIX does")
def test_a_process_that_is_killed_leaves_every_finished_snapshot_and_no_half_one(tmp_path):
    folders = [tmp_path / str(i) for i in range(12)]
    run(KILLED, *folders)
    halves = [half for folder in folders for half in folder.glob(".*")]
    assert halves  # else nobody was killed while it wrote
    for folder in folders:
        store = Store(folder)
        assert len(store.snapshots) >= 3
        for snapshot in store.snapshots[1:]:
            mean = float(snapshot.profile.steps.mean())
            assert snapshot.path.name.endswith(f"-{snapshot.step:012d}.safetensors")
            assert torch.equal(snapshot.read_weights("w"), torch.full((60_000,), mean, dtype=torch.float64))
        made = quietly(store, "swa")
        assert made.state_dict["w"][0].item() == pytest.approx((1 + made.at_step) / 2)
        load_file(store.snapshots[-1].path)  # whole for others, too
        Recorder(polyak.average({"w": torch.zeros(60_000, dtype=torch.float64)}), folder, every=2)
        assert not list(folder.glob(".*"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of resources are POSIX's")
def test_a_full_disk_costs_the_snapshots_of_that_time_and_nothing_else(tmp_path):
    failed = json.loads(run(LIMITED, tmp_path))
    assert {step for step in failed if step % 10 == 0} == {20, 30, 40}
    assert all(15 <= step < 45 for step in failed)
    assert not list(tmp_path.glob(".*"))
    steps = {snapshot.step for snapshot in Store(tmp_path).snapshots if snapshot.average == "average"}
    assert {10, 50, 60} <= steps
    assert not {20, 30, 40} & steps
    blocks = [s for s in Store(tmp_path).snapshots if s.average == "blocks"]
    assert [step for block in blocks for step in block.profile.steps.tolist()] == list(range(1, 61))
    assert synthesize(tmp_path, "swa").state_dict["w"][0].item() == pytest.approx(30.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
def test_synthesis_takes_the_memory_of_its_result_and_of_two_tensors(tmp_path):
    size = 1 << 20  # 4 MiB in float32
    model = {f"t{i}": torch.zeros(size) for i in range(8)}
    bank = polyak.bank(model, {f"p{s}": {"name": "power", "sigma_rel": s} for s in (0.05, 0.1)})
    with Recorder(bank, tmp_path / "large", every=1):
        for step in range(1, 17):
            for tensor in model.values():
                tensor.fill_(step)
            bank.update()
    files = [path for path in (tmp_path / "large").iterdir() if path.name.startswith("p")]
    assert len(files) == 32
    counted(tmp_path / "small", 20)
    grown, output = map(int, run(MEASURED, tmp_path / "small", tmp_path / "large").split())
    assert output == 8 * size * 4
    # One tensor of each file would be 128 MiB; in truth one in float32 and the sum in float64.
    assert grown <= output + 6 * size * 4
    assert grown >= output / 2  # it was measured at all


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-5], "cut off"),
        (lambda data: data[:40], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: data.replace(b'\\"format\\": 1', b'\\"format\\": 9'), "upgrade polyak"),
        (lambda data: data.replace(b'\\"format\\"', b'\\"fermat\\"'), "damaged snapshot"),
        (lambda data: data.replace(b'\\"layout\\"', b'\\"leyout\\"'), "damaged snapshot"),
        (lambda data: data.replace(b'"polyak_snapshot":"{', b'"polyak_snapshot":"['), "damaged snapshot"),
    ],
    ids=["cut", "cut in the header", "empty", "newer", "no format", "no layout", "no json"],
)
def test_a_damaged_snapshot_is_named(tmp_path, change, message):
    counted(tmp_path, 30)
    path = tmp_path / "average-000000000020.safetensors"
    data = without_checksums(path.read_bytes())
    assert change(data) != data
    path.write_bytes(change(data))
    with pytest.raises(StateError, match=f"average-000000000020.*{message}"):
        synthesize(tmp_path, "swa")


def test_what_is_no_snapshot_is_left_alone(tmp_path):
    counted(tmp_path, 30)
    before = synthesize(tmp_path, "swa").coefficients
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".average-000000000040.safetensors.7.tmp").write_bytes(b"half of it")
    (tmp_path / ".hidden.safetensors").write_bytes(b"no such thing")
    synthesize(tmp_path, "ema", decay=0.999).save(tmp_path / "best.safetensors")
    assert synthesize(tmp_path, "swa").coefficients == before


def test_a_profile_that_is_damaged_is_named(tmp_path):
    counted(tmp_path, 30)
    path = tmp_path / "average-000000000020.safetensors"
    path.write_bytes(
        without_checksums(path.read_bytes()).replace(
            b'\\"strategy\\": {\\"name\\": \\"ema\\"', b'\\"strategy\\": {\\"name\\": \\"eme\\"'
        )
    )
    with pytest.raises(StateError, match="a snapshot's profile is damaged"):
        synthesize(tmp_path, "swa")
