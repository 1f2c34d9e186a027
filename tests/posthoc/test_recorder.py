"""The recorder: what it writes, when, and how exactly."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak import ConfigError, PolyakWarning, Profile, StateError
from polyak.engine.plan import plan
from polyak.posthoc import Recorder, Store, synthesize
from polyak.posthoc.snapshot import Snapshot
from posthoc.runs import counted, quietly
from recording import assert_exact, files, fresh, run_of, series, steps_of


def test_an_average_and_the_means_of_blocks_are_written_at_each_multiple(tmp_path):
    counted(tmp_path, 95, every=20)
    ends = [20, 40, 60, 80, 95]  # the last block is a shorter one
    assert steps_of(tmp_path, "average") == steps_of(tmp_path, "blocks") == ends
    assert files(tmp_path)[-1] == "start-000000000000.safetensors"
    for begin, snapshot in zip([1, 21, 41, 61, 81], series(tmp_path, "blocks"), strict=True):
        assert snapshot.profile.steps.tolist() == list(range(begin, snapshot.step + 1))
        assert snapshot.read_weights("w").item() == pytest.approx((begin + snapshot.step) / 2)
    assert_exact(tmp_path)
    assert synthesize(tmp_path, "swa").state_dict["w"].item() == pytest.approx(48.0)


def test_a_bank_is_a_series_for_each_average_and_one_of_blocks(tmp_path):
    averages = {"a": {"name": "ema", "decay": 0.9}, "a/b c": {"name": "ema", "decay": 0.5, "every": 5}, "é": "swa"}
    counted(tmp_path, 40, averager=averages, every=10)
    assert {snapshot.average for snapshot in Store(tmp_path).snapshots} == {"a", "a/b c", "é", "blocks", "start"}
    assert steps_of(tmp_path, "a/b c") == [10, 20, 30, 40]
    assert_exact(tmp_path)


@pytest.mark.parametrize(
    ("averages", "blocks"),
    [
        ({"p": "power"}, False),
        ({"p": "power", "q": {"name": "power", "sigma_rel": 0.05}}, False),
        ({"e": "ema"}, True),
        ({"p": "power", "e": "ema"}, True),
        ({"e": "ema", "blocks": {"name": "block_mean", "length": 10}}, False),
    ],
    ids=str,
)
def test_means_of_blocks_are_kept_where_nothing_else_was_made_for_synthesis(tmp_path, averages, blocks):
    counted(tmp_path, 20, averager=averages, every=10)
    assert len(series(tmp_path, "blocks")) == (2 if blocks or "blocks" in averages else 0)
    assert_exact(tmp_path)


def test_blocks_can_be_left_out_or_asked_for(tmp_path):
    counted(tmp_path / "without", 20, blocks=False)
    counted(tmp_path / "with", 20, averager={"p": "power"}, blocks=True)
    assert not series(tmp_path / "without", "blocks")
    assert steps_of(tmp_path / "with", "blocks") == [10, 20]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_so_many_of_each_series_are_kept(tmp_path, keep):
    counted(tmp_path, 57, averager={"a": "swa", "a-b": "ema"}, every=10, keep=keep)
    for name in ("a", "a-b", "blocks"):
        assert steps_of(tmp_path, name) == [10, 20, 30, 40, 50, 57][-keep:]
    assert steps_of(tmp_path, "start") == [0]


@pytest.mark.parametrize("scale", [2 * 10**11, 3 * 10**12])
def test_the_latest_are_kept_however_many_digits_their_steps_have(tmp_path, scale):
    averager = polyak.average({"w": torch.zeros(1)}, "swa")
    with Recorder(averager, tmp_path, every=scale, keep=3):
        for step in range(1, 13):
            averager.update(step=step * scale)
    assert steps_of(tmp_path, "average") == [10 * scale, 11 * scale, 12 * scale]


def test_nothing_is_written_twice_and_nothing_after_the_end(tmp_path):
    model = {"w": torch.zeros(1)}
    averager = polyak.average(model, "swa")
    recorder = Recorder(averager, tmp_path, every=10)
    for _ in range(15):
        averager.update()
    recorder.close()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    recorder.close()
    for _ in range(20):
        averager.update()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert steps_of(tmp_path, "average") == [10, 15]
    assert not averager.updater.listeners


def test_a_recorder_that_saw_nothing_writes_nothing(tmp_path):
    with Recorder(polyak.average({"w": torch.zeros(1)}), tmp_path / "deep" / "folder", every=10):
        pass
    assert files(tmp_path / "deep" / "folder") == []


def test_a_recorder_that_is_deleted_and_was_not_closed_names_what_it_has_not_written(tmp_path):
    averager = polyak.average({"w": torch.zeros(1)}, "swa")
    Recorder(averager, tmp_path, every=25)
    for _ in range(60):
        averager.update()
    del averager
    with pytest.warns(PolyakWarning, match=r"never closed: no snapshot holds the updates after step 50, up to step 60"):
        gc.collect()


def test_a_recorder_that_has_written_all_or_was_closed_can_be_deleted(tmp_path):
    for number, (updates, close) in enumerate([(50, False), (0, False), (60, True)]):
        averager = polyak.average({"w": torch.zeros(1)}, "swa")
        recorder = Recorder(averager, tmp_path / str(number), every=25)
        for _ in range(updates):
            averager.update()
        if close:
            recorder.close()
        del averager, recorder
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gc.collect()
        assert not caught


def test_a_process_that_ends_without_closing_its_recorder_says_so(tmp_path):
    code = """
import sys, torch, polyak
averager = polyak.average({"w": torch.zeros(1)}, "swa")
recorder = polyak.posthoc.Recorder(averager, sys.argv[1], every=5)
for _ in range(7):
    averager.update()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "after step 5, up to step 7" in done.stderr


def test_an_exception_in_training_still_writes_the_last_updates(tmp_path):
    averager = polyak.average({"w": torch.zeros(1)}, "swa")

    def train():
        with Recorder(averager, tmp_path, every=10):
            for _ in range(7):
                averager.update()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert steps_of(tmp_path, "average") == [7]


@pytest.mark.parametrize(
    "options",
    [
        {"every": 5},
        {"start": 13},
        {"start": 13, "every": 4},
        {"every": 30},
        {"origin": "initial", "start": 7},
        {"name": "swa"},
        {"name": "lawa", "window": 12},
        {"name": "dema", "decay": 0.8},
        {"name": "power", "every": 3},
    ],
    ids=str,
)
def test_any_cadence_of_the_average_is_recorded_exactly(tmp_path, options):
    counted(tmp_path, 77, averager={"x": {"name": "ema", **options}}, every=10)
    assert_exact(tmp_path)
    assert steps_of(tmp_path, "x")[-1] == max(s for s in range(78) if s % options.get("every", 1) == 0)
    made = quietly(tmp_path, "swa", start=max(options.get("start", 0), 1))
    exact = sum(share * step for share, step in zip(made.profile.shares, made.profile.steps, strict=True))
    # Between two updates the profile is spread over steps whose weights were not taken.
    assert made.state_dict["w"].item() == pytest.approx(exact, abs=options.get("every", 1))


@pytest.mark.filterwarnings("ignore:the weights hold NaN:polyak.PolyakWarning")
def test_weights_that_are_not_finite_leave_a_hole_that_the_profile_knows(tmp_path):
    model, averager = fresh(decay=0.9, nonfinite="skip")
    with Recorder(averager, tmp_path, every=5):
        for step in range(1, 41):
            model["w"].fill_(float("nan") if step in {3, 5, 10, *range(16, 28)} else step)
            averager.update()
    assert_exact(tmp_path)
    assert all(snapshot.read_weights("w").isfinite().all() for snapshot in Store(tmp_path).snapshots)
    taken = [step for snapshot in series(tmp_path, "blocks") for step in snapshot.profile.steps.tolist()]
    assert taken == [step for step in range(1, 41) if step not in {3, 5, 10, *range(16, 28)}]


@pytest.mark.filterwarnings("ignore:the weights hold NaN:polyak.PolyakWarning")
def test_what_an_average_propagates_does_not_get_into_the_means_of_blocks(tmp_path):
    model, averager = fresh("swa", nonfinite="propagate")
    with Recorder(averager, tmp_path, every=5):
        for step in range(1, 21):
            model["w"].fill_(float("nan") if step == 18 else step)
            averager.update()
    assert series(tmp_path, "average")[-1].read_weights("w").isnan().all()
    assert all(snapshot.read_weights("w").isfinite().all() for snapshot in series(tmp_path, "blocks"))


def test_steps_counted_from_zero_and_steps_that_jump_are_recorded_exactly(tmp_path):
    values = lambda step: float(step + 1)
    model, averager = fresh("swa")
    with Recorder(averager, tmp_path / "zero", every=10):
        run_of(model, averager, range(40), given=True, values=values)
    assert_exact(tmp_path / "zero", values)
    made = quietly(tmp_path / "zero", "power", sigma_rel=0.2)
    told = made.profile.start * 0.0
    told += sum(p * values(s) for s, p in zip(made.profile.steps.tolist(), made.profile.shares, strict=True))
    assert made.state_dict["w"].item() == pytest.approx(told, rel=1e-12)
    assert made.profile.start + made.profile.shares.sum() == pytest.approx(1.0, abs=1e-12)

    model, averager = fresh("swa")
    with Recorder(averager, tmp_path / "means", every=10, blocks=False):
        run_of(model, averager, range(40), given=True, values=values)
    made = quietly(tmp_path / "means", "ema", decay=0.95)
    assert made.profile.steps[0] == 0
    told = sum(p * values(s) for s, p in zip(made.profile.steps.tolist(), made.profile.shares, strict=True))
    assert made.state_dict["w"].item() == pytest.approx(told, rel=1e-12)

    model, averager = fresh("swa")
    with Recorder(averager, tmp_path / "jumps", every=100):
        run_of(model, averager, range(10, 1010, 10), given=True)
    assert_exact(tmp_path / "jumps")
    strides = [snapshot.profile._strides.tolist() for snapshot in series(tmp_path / "jumps", "blocks")]
    assert all(stride == 10 for block in strides[1:] for stride in block)


def test_two_recorders_follow_one_averager(tmp_path):
    model, averager = fresh()
    with Recorder(averager, tmp_path / "a", every=10), Recorder(averager, tmp_path / "b", every=7, blocks=False):
        run_of(model, averager, range(1, 29))
    assert steps_of(tmp_path / "a", "average") == [10, 20, 28]
    assert steps_of(tmp_path / "b", "average") == [7, 14, 21, 28]
    assert_exact(tmp_path / "a")
    assert_exact(tmp_path / "b")


def test_a_copy_of_the_averager_is_not_followed(tmp_path):
    model, averager = fresh()
    with Recorder(averager, tmp_path, every=5):
        run_of(model, averager, range(1, 4))
        other = copy.deepcopy(averager)
        for step in range(4, 13):
            model["w"].fill_(-1.0)
            other.update(model)
            model["w"].fill_(step)
            averager.update()
    assert steps_of(tmp_path, "average") == [5, 10, 12]
    assert_exact(tmp_path)


def test_an_offloaded_average_is_recorded_without_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "crosses", lambda average, live: True)
    model, averager = fresh()
    with pytest.raises(ConfigError, match="block_mean"):
        Recorder(averager, tmp_path / "never", every=10, blocks=True)
    assert not (tmp_path / "never").exists()
    with Recorder(averager, tmp_path, every=10):
        run_of(model, averager, range(1, 26))
    assert steps_of(tmp_path, "average") == [10, 20, 25]
    assert not series(tmp_path, "blocks")
    assert_exact(tmp_path)
    assert threading.active_count() < 50


def test_a_regular_profile_takes_a_few_bytes_however_long_the_run(tmp_path):
    counted(tmp_path, 600, every=300)
    for snapshot in Store(tmp_path).snapshots[1:]:
        assert not any(name.startswith("profile/") for name in snapshot.file.names)
    for snapshot in series(tmp_path, "average"):
        expected = Profile.of(polyak.EMA(), snapshot.step)
        np.testing.assert_array_equal(snapshot.profile.shares, expected.shares)


@pytest.mark.filterwarnings("ignore:the weights hold NaN")
@pytest.mark.parametrize("name", ["ema", "swa", "lawa", "dema", "polynomial"])
def test_each_step_that_is_left_out_takes_a_few_bytes_however_long_the_run(tmp_path, name):
    sizes = {}
    for holes in (1, 2):
        for steps in (100, 2000):
            values = [math.nan if step in range(30, 30 + 7 * holes, 7) else step for step in range(1, steps + 1)]
            folder = tmp_path / f"{holes}-{steps}"
            counted(folder, steps, averager=name, every=steps, values=values, blocks=False, nonfinite="skip")
            sizes[holes, steps] = (folder / f"average-{steps:012d}.safetensors").stat().st_size
            assert len(Store(folder).snapshots[-1].profile) == steps - holes
    assert abs(sizes[1, 2000] - sizes[1, 100]) <= 32
    assert sizes[2, 100] - sizes[1, 100] <= 96


def test_training_a_module_needs_no_call_but_the_update(tmp_path):
    model = nn.Linear(4, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, tmp_path, every=10):
        for _ in range(30):
            optimiser.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimiser.step()
            averager.update()
    made = synthesize(tmp_path, "ema", decay=0.9)
    assert made.profile_error < 1e-12
    assert torch.equal(made.state_dict["weight"], averager.averages["weight"])


def test_a_snapshot_that_vanishes_while_the_folder_is_listed_is_left_out(tmp_path, monkeypatch):
    counted(tmp_path, 30)
    before = len(Store(tmp_path).snapshots)
    read = Snapshot.read.__func__
    gone = []

    def reading(cls, path):
        if not gone and "-000000000010" in path.name:
            gone.append(path)
            path.unlink()
        return read(cls, path)

    monkeypatch.setattr(Snapshot, "read", classmethod(reading))
    assert len(Store(tmp_path).snapshots) == before - 1


def test_a_run_that_began_elsewhere_takes_nothing_of_another_runs_folder(tmp_path):
    counted(tmp_path, 30)
    before = sorted(files(tmp_path))
    model, averager = fresh("swa")
    run_of(model, averager, range(1, 4))
    with Recorder(averager, tmp_path, every=5), pytest.raises(StateError, match="another run, up to step 30"):
        averager.update()
    assert sorted(files(tmp_path)) == before


def test_weights_that_are_given_to_each_update_are_those_of_the_blocks(tmp_path):
    weights = {"w": torch.zeros(3, dtype=torch.float64)}
    averager = polyak.average(weights, "swa")
    with Recorder(averager, tmp_path, every=5):
        for _ in range(10):
            weights = {"w": weights["w"] + 1}
            averager.update(weights)
    assert synthesize(tmp_path, "tail", fraction=0.5, total_steps=10).state_dict["w"].tolist() == [8.0] * 3
