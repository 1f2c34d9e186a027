"""Two recorders, two processes and one folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import polyak
from polyak import StateError
from polyak.posthoc import Recorder, Store
from recording import fresh, run_of


def test_two_runs_that_record_into_one_folder_at_once_are_told_apart(tmp_path):
    (model, averager), (other_model, other) = fresh("swa"), fresh("swa")
    first, second = Recorder(averager, tmp_path, every=4), Recorder(other, tmp_path, every=4)
    for _ in range(3):
        averager.update()
        other.update()
    with pytest.raises(StateError, match="another recorder has begun to record into"):
        run_of(model, averager, range(4, 9))
    run_of(other_model, other, range(4, 9))
    second.close()
    with pytest.raises(StateError, match="another recorder has begun to record into"):
        first.close()
    assert {snapshot.about.run for snapshot in Store(tmp_path).snapshots if snapshot.step} == {
        Store(tmp_path).snapshots[-1].about.run
    }


def test_two_recorders_of_one_averager_in_one_folder_are_refused_at_the_first_snapshot(tmp_path):
    model, averager = fresh("swa")
    first, second = Recorder(averager, tmp_path, every=4), Recorder(averager, tmp_path, every=4)
    with pytest.raises(StateError, match="another recorder has begun"):
        run_of(model, averager, range(1, 5))
    with pytest.raises(StateError, match="another recorder has begun"):
        first.close()
    second.close()


def test_two_recorders_of_one_averager_in_two_folders_go_on(tmp_path):
    model, averager = fresh("swa")
    with Recorder(averager, tmp_path / "a", every=4), Recorder(averager, tmp_path / "b", every=2):
        run_of(model, averager, range(1, 9))
    assert [len(Store(tmp_path / name).snapshots) for name in "ab"] == [5, 9]


ALIVE = """
import sys, torch, polyak
averager = polyak.average({"w": torch.zeros(3, dtype=torch.float64)}, "swa")
recorder = polyak.posthoc.Recorder(averager, sys.argv[1], every=2)
averager.update()
print("records", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file locks are POSIX's")
def test_a_job_whose_folder_another_process_records_into_is_refused_until_that_one_is_gone(tmp_path):
    job = [sys.executable, "-c", ALIVE, str(tmp_path)]
    with subprocess.Popen(job, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "records\n"
        averager = polyak.average({"w": torch.zeros(3, dtype=torch.float64)}, "swa")
        recorder = Recorder(averager, tmp_path, every=2)
        with pytest.raises(StateError, match="another process records into"):
            averager.update()
        other.kill()
    averager.update()
    averager.update()
    recorder.close()
    assert Store(tmp_path).snapshots[-1].step == 3


FORKED = """
import os, sys, torch, polyak
model = {"w": torch.zeros(3, dtype=torch.float64)}
averager = polyak.average(model, "swa", kernel="loop")
recorder = polyak.posthoc.Recorder(averager, sys.argv[1], every=2)
def go(steps):
    for _ in range(steps):
        model["w"] += 1
        averager.update()
go(4)
child = os.fork()
if not child:
    try:
        go(20)
    except polyak.StateError as error:
        assert "this process was forked from the one that records" in str(error), error
        os._exit(3)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
go(4)
recorder.close()
made = polyak.posthoc.synthesize(sys.argv[1], "swa")
assert made.state_dict["w"].tolist() == averager.averages["w"].tolist(), made
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
def test_a_forked_process_does_not_go_on_recording(tmp_path):
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], check=True, timeout=120)
