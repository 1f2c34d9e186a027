"""Files that are whole or absent: scratch files, writers that die, and what is no file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import polyak
from interrupts import at_line
from polyak.distributed.atomic_folder import AtomicFolder
from polyak.io import atomic
from polyak.io.atomic import exclusive, remove_stale, scratch_folder, write_whole

posix = pytest.mark.skipif(sys.platform == "win32", reason="locks, FIFOs and devices are POSIX's")
SUFFIXES = (".pt", ".safetensors")

DYING = """
import os, signal, sys
from pathlib import Path
from polyak.io.atomic import write_whole

def write(scratch):
    scratch.write_text("half")
    (scratch.parent / ".tmpAbC").write_text("a half of some package's own")
    print("written", flush=True)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()

write_whole(Path(sys.argv[1]), write)
"""


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def averager() -> polyak.Averager:
    made = polyak.average({"w": torch.arange(1000.0)}, "ema", decay=0.5)
    made.update()
    return made


def started(path: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, str(path), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    return process


@posix
@pytest.mark.parametrize("name", ["it.pt", "another.safetensors"])
def test_what_a_killed_writer_left_is_removed_by_the_next_save_of_any_file(tmp_path, name):
    started(tmp_path / "it.pt", "dies").communicate()
    assert len(hidden(tmp_path)) == 1
    polyak.save(averager(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@posix
def test_what_a_living_writer_has_is_left_alone_and_becomes_its_file(tmp_path):
    process = started(tmp_path / "it.pt", "lives")
    polyak.save(averager(), tmp_path / "other.pt")
    polyak.save(averager(), tmp_path / "it.pt")
    remove_stale(tmp_path)
    assert len(hidden(tmp_path)) == 1
    process.communicate("")
    assert process.returncode == 0
    assert (tmp_path / "it.pt").read_text() == "half"
    assert not hidden(tmp_path)


@posix
def test_ctrl_c_at_any_line_leaves_no_scratch_folder(tmp_path):
    with at_line((atomic,)) as lines:
        write_whole(tmp_path / "it", lambda scratch: scratch.write_text("whole"))
    assert hidden(tmp_path) == []
    for k in range(len(lines)):
        with pytest.raises(KeyboardInterrupt), at_line((atomic,), k):
            write_whole(tmp_path / "it", lambda scratch: scratch.write_text("whole"))
        assert hidden(tmp_path) == []
        assert (tmp_path / "it").read_text() == "whole"


@posix
def test_a_folder_that_nobody_locks_is_removed_and_others_are_not(tmp_path):
    (tmp_path / ".polyak-abc").mkdir()
    (tmp_path / ".polyakovitch").mkdir()
    (tmp_path / ".polyak-file").write_text("a file of somebody's")
    (tmp_path / ".polyak-notes").mkdir()
    (tmp_path / ".polyak-notes" / "one").write_text("a folder of somebody's")
    with scratch_folder(tmp_path) as own:
        remove_stale(tmp_path)
        assert own.is_dir()
    assert {path.name for path in hidden(tmp_path)} == {".polyakovitch", ".polyak-file", ".polyak-notes"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_writers_of_one_path_leave_one_whole_file(tmp_path, suffix):
    path, problems = tmp_path / f"it{suffix}", []
    averagers = [polyak.average({"w": torch.full((20_000,), float(i))}, "swa") for i in range(4)]

    def save(one: polyak.Averager) -> None:
        try:
            for _ in range(5):
                polyak.save(one, path)
        except Exception as error:  # noqa: BLE001 - of a thread
            problems.append(error)

    threads = [threading.Thread(target=save, args=(one,)) for one in averagers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            read = polyak.average({"w": torch.zeros(20_000)}, "swa")
            polyak.load(read, path)
            assert len(read.averages["w"].unique()) == 1
    assert not problems
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_name_as_long_as_a_disk_takes_is_written(tmp_path):
    path = tmp_path / f"{'n' * 252}.pt"
    polyak.save(averager(), path)
    polyak.load(averager(), path)


def test_a_full_disk_keeps_its_number(tmp_path):
    def write(scratch: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(polyak.WriteError, match="No space left on device") as error:
        write_whole(tmp_path / "it", write)
    assert error.value.errno == errno.ENOSPC
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error", [RuntimeError("of a library"), ValueError("too"), MemoryError()], ids=repr)
def test_whatever_a_library_raises_is_an_error_of_polyak_and_what_was_there_stays(tmp_path, error):
    def write(scratch: Path) -> None:
        scratch.write_text("half")
        raise error

    (tmp_path / "it").write_text("whole")
    with pytest.raises(polyak.WriteError, match=type(error).__name__):
        write_whole(tmp_path / "it", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@posix
@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "socket"])
def test_what_is_no_file_is_refused_by_save_and_load_at_once(tmp_path, monkeypatch, suffix, kind):
    import socket

    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path(f"it{suffix}")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    before = path.lstat()
    with pytest.raises(polyak.WriteError, match=f"belongs to a {kind}"):
        polyak.save(averager(), path)
    with pytest.raises(polyak.StateError, match=f"{kind}"):
        polyak.load(averager(), path)
    assert path.lstat()[:6] == before[:6]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@posix
@pytest.mark.timeout(60)
def test_a_fifo_among_snapshots_and_in_the_place_of_a_synthesis_is_refused_at_once(tmp_path):
    one = polyak.average({"w": torch.zeros(3)}, "ema")
    with polyak.posthoc.Recorder(one, tmp_path, every=2):
        for _ in range(4):
            one.update()
    made = polyak.posthoc.synthesize(tmp_path, "swa")
    os.mkfifo(tmp_path / "average-000000000009.safetensors")
    with pytest.raises(polyak.StateError, match="a FIFO"):
        polyak.posthoc.synthesize(tmp_path, "swa")
    os.mkfifo(tmp_path / "made.safetensors")
    with pytest.raises(polyak.WriteError, match="a FIFO"):
        made.save(tmp_path / "made.safetensors")


def test_two_writers_of_one_folder_leave_the_last_one_whole_and_nothing_else(tmp_path):
    target = tmp_path / "average"
    for _ in range(2):
        with ExitStack() as held:
            places = AtomicFolder(target), AtomicFolder(target)
            scratches = [place.prepare(held) for place in places]
            for number, scratch in enumerate(scratches):
                scratch.mkdir()
                (scratch / "__0_0.distcp").write_text(str(number))
            for place, scratch in zip(places, scratches, strict=True):
                place.publish(scratch)
        assert [path.read_text() for path in target.iterdir()] == ["1"]
        assert [path.name for path in tmp_path.iterdir()] == ["average"]


def test_a_process_that_was_forked_meanwhile_keeps_no_folder_locked(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    end, hold = os.pipe()
    with exclusive(tmp_path):
        child = os.fork()
        if not child:
            os.close(hold)
            os.read(end, 1)
            os._exit(0)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    os.close(hold)
    os.waitpid(child, 0)
