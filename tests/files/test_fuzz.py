"""Damaged headers, pickles and indices: an error of polyak's in words or a result; never a crash, a hang, or a rest."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from files.conftest import weights
from polyak import files
from polyak.errors import PolyakError

FEW, MANY = 150, 2_000  # cases of each of the kinds
LONGEST = 10  # seconds for one case
GROWTH = 400  # MiB of all cases together
INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"R",
    b"c",
    b"\x85",
    b"(",
    b"t",
    b"}",
    b"]",
    b"-1",
    b"9" * 18,
    b"\xff" * 8,
)


def saved(tmp_path, seed=0):
    """Write one whole checkpoint of each kind; return the file of each that is damaged, and what is opened."""
    state = weights(seed)
    root = tmp_path / f"whole{seed}"
    root.mkdir()
    save_file(state, root / "a.safetensors")
    torch.save({"model": state, "step": 3, "optimizer": {"state": {}, "param_groups": []}}, root / "a.pt")
    torch.save(state, root / "b.pt", _use_new_zipfile_serialization=False)
    dcp.save({"model": nn.Linear(2, 2).state_dict(), "step": 3}, checkpoint_id=root / "dcp")
    (root / "hf").mkdir()
    save_file(state, root / "hf" / "one.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "one.safetensors")}
    (root / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "safetensors": (root / "a.safetensors", root / "a.safetensors"),
        "torch": (root / "a.pt", root / "a.pt"),
        "legacy": (root / "b.pt", root / "b.pt"),
        "dcp": (root / "dcp" / ".metadata", root / "dcp"),
        "index": (root / "hf" / "model.safetensors.index.json", root / "hf"),
    }


def damaged(data, rng, kind):
    """Return bytes with some changes, most of them where a file says what it holds."""
    if kind == "torch" and rng.random() < 0.7:
        return rezipped(data, rng)
    made = bytearray(data)
    head = {"safetensors": 700, "legacy": 1500}.get(kind, len(made))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(head, len(made)))
        what = rng.randrange(5)
        if what == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            new = rng.choice(INTERESTING)
            made[at : at + len(new)] = new
        elif what == 2:
            made[at:at] = rng.choice(INTERESTING)
        elif what == 3:
            del made[at : at + rng.randrange(1, 9)]
        else:
            del made[at:]
        if not made:
            break
    return bytes(made)


def rezipped(data, rng):
    """Return an archive whose pickle is damaged and whose directory is whole."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as made:
        for record in source.infolist():
            content = source.read(record)
            made.writestr(record.filename, damaged(content, rng, "") if record.filename.endswith(".pkl") else content)
    return target.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy", "dcp", "index"])
def test_damaged_files_are_refused_in_words_and_leave_nothing(kind, count, tmp_path, request):
    whole, victim = saved(tmp_path, 0), saved(tmp_path, 1)
    (file, opened), rng = victim[kind], random.Random(random.getrandbits(32) if count == MANY else 5)
    data, out, before = file.read_bytes(), tmp_path / "o.safetensors", peak()
    refused = 0
    for number in range(count):
        file.write_bytes(damaged(data, rng, kind))
        started = time.monotonic()
        try:
            files.average([whole[kind][1], opened], out=out, nonfinite="propagate")
            out.unlink()
        except PolyakError:
            refused += 1
        except BaseException:
            kept = Path(os.environ.get("TMPDIR", "/tmp")) / f"polyak-fuzz-{kind}-{number}"
            kept.write_bytes(file.read_bytes())
            raise
        assert time.monotonic() - started < LONGEST
        assert {path.name for path in tmp_path.iterdir()} == {"whole0", "whole1"}
    assert refused > count // 4
    assert peak() - before < GROWTH


def peak():
    told = Path("/proc/self/status")
    if not told.exists():
        return 0.0
    (line,) = (line for line in told.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


BOMBS = {
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 20 + b".",
    "bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b".",
    "nested": b"\x80\x02" + b")" + b"\x85" * 500_000 + b"}" + b"N" + b"s" + b".",
    "laughs": b"\x80\x02]" + b"".join(b"q%c(h%ch%cl" % (i, i, i) for i in range(1, 60)) + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_would_fill_the_memory(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as made:
        made.writestr("archive/data.pkl", BOMBS[name])
        made.writestr("archive/version", b"3\n")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from polyak import files\nfrom polyak.errors import PolyakError\n"
        "try:\n    files.open(sys.argv[1])\nexcept PolyakError as error:\n    print('refused')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "refused\n"
