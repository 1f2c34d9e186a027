"""``polyak bench ranks`` starts real processes, each with its shards; one that fails is named, and no other stays."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

import polyak
from on_ranks.start import FSDP2_TRAINS
from polyak.__main__ import main
from polyak.bench import Settings
from polyak.bench.launch import Task, launched
from polyak.bench.settings import ConfigError

TINY = """
import os
import signal
import sys
from pathlib import Path

from torch import nn

def net():
    return nn.Sequential(nn.Linear(100, 40), nn.BatchNorm1d(40))

def started():
    rank = sys.argv[-1]
    Path(f"started-{rank}").write_text(str(os.getpid()))
    return rank

def breaks_on_one():
    if started() == "1":
        raise ValueError("no such\\nlayer")
    return net()

def dies_on_one():
    if started() == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return net()
"""
VALUES = 100 * 40 + 40 + 2 * 40 + 2 * 40  # the last two are buffers, which FSDP2 leaves whole
PARTS = (VALUES - 2 * 40) // 2


@pytest.fixture(autouse=True)
def _beside_tiny(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not FSDP2_TRAINS, reason="the FSDP2 of torch 2.6 does not train on CPUs")
def test_the_command_tells_time_and_bytes_on_each_number_of_ranks(tmp_path, monkeypatch, capsys):
    options = ["--model", "tiny:net", "--device", "cpu", "--ranks", "2", "--ranks", "1", "--seconds", "0"]
    options += ["--json", "a.json", "--plot", "a.png"]
    monkeypatch.setattr("sys.argv", ["polyak", "bench", *options])  # ranks are asked for, so it is the case
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()

    assert not ended.value.code
    out = capsys.readouterr().out
    assert "slowest rank, ms" in out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    asked = [("polyak auto", "1 rank"), ("polyak auto", "2 ranks")]
    asked += [("polyak propagate", "1 rank"), ("polyak propagate", "2 ranks")]
    assert [(one["setting"], one["subject"]) for one in rows] == asked
    for one in rows:
        assert one["reference"] == "1 rank"
        assert 0 < one["milliseconds"]["median"] <= one["slowest"]
        whole = 4 * VALUES + 8  # and the counter of batches
        wanted = whole if one["subject"] == "1 rank" else 4 * (PARTS + 2 * 40) + 8
        assert (one["weights"], one["held"], one["whole"]) == (wanted, wanted, whole)
    assert [one["ratio"]["median"] for one in rows if one["subject"] == "1 rank"] == [1.0, 1.0]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 700


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("breaks_on_one", r"rank 1 of 2 failed on 'tiny:breaks_on_one' \(status 1\): ConfigError: .*no such layer"),
        pytest.param(
            "dies_on_one",
            r"rank 1 of 2 failed on 'tiny:dies_on_one' \(status -9\): no word",
            marks=pytest.mark.distributed,
        ),
    ],
    ids=["breaks", "dies"],
)
def test_a_rank_that_fails_is_named_with_its_reason_and_the_others_are_ended(model, told, tmp_path):
    task = Task(model=f"tiny:{model}", ranks=2, threads=1, settings=Settings(device="cpu", seconds=0))
    with pytest.raises(polyak.DistributedError, match=told):
        launched(task)
    for file in tmp_path.glob("started-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_there_are_one_two_or_four_ranks_where_there_is_room(monkeypatch):
    settings = Settings(device="cpu")
    for room, wanted in ((1, [1]), (2, [1, 2]), (3, [1, 2]), (64, [1, 2, 4])):
        monkeypatch.setattr(Settings, "room", room)
        assert settings.chosen_ranks() == wanted
    assert Settings(device="cpu", ranks=(8, 3, 8)).chosen_ranks() == [3, 8]


def test_an_accelerator_is_not_shared(monkeypatch):
    monkeypatch.setattr(Settings, "place", torch.device("cuda"))
    monkeypatch.setattr(Settings, "room", 1)
    with pytest.raises(ConfigError, match="ranks: got 2; expected 1 to 1 here, one for each device"):
        Settings(ranks=(1, 2))
