"""The recorder: what it writes and when, how it goes on after a stop, and what it refuses."""

from __future__ import annotations

import copy
import gc
import math
import os
import subprocess
import sys
import threading
import warnings
from uuid import UUID

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from models import mlp
from polyak import ConfigError, PolyakWarning, Profile, SnapshotError, StateError
from polyak.engine.plan import plan
from polyak.posthoc import Recorder, Store, synthesize
from polyak.posthoc.snapshot import Snapshot
from posthoc.runs import counted, killed, quietly


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def series(folder, name):
    """Return the snapshots of a series, in order."""
    return [snapshot for snapshot in Store(folder).snapshots if snapshot.average == name]


def steps(folder, name):
    return [snapshot.step for snapshot in series(folder, name)]


def assert_exact(folder, values=float, start=0.0):
    """Every snapshot must be what its profile says of the weights of each step."""
    for snapshot in Store(folder).snapshots:
        profile = snapshot.profile
        shares = zip(profile.steps.tolist(), profile.shares, strict=True)
        told = profile.start * start + sum(share * values(step) for step, share in shares)
        assert snapshot.read_weights("w").item() == pytest.approx(told, rel=1e-12, abs=1e-12), snapshot.path.name
        assert profile.start + profile.shares.sum() == pytest.approx(1.0, abs=1e-12)


def test_an_average_and_the_means_of_blocks_are_written_at_each_multiple(tmp_path):
    counted(tmp_path, 95, every=20)
    ends = [20, 40, 60, 80, 95]  # the last block is a shorter one
    assert steps(tmp_path, "average") == steps(tmp_path, "blocks") == ends
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
    assert steps(tmp_path, "a/b c") == [10, 20, 30, 40]
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
    assert steps(tmp_path / "with", "blocks") == [10, 20]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_so_many_of_each_series_are_kept(tmp_path, keep):
    counted(tmp_path, 57, averager={"a": "swa", "a-b": "ema"}, every=10, keep=keep)
    for name in ("a", "a-b", "blocks"):
        assert steps(tmp_path, name) == [10, 20, 30, 40, 50, 57][-keep:]
    assert steps(tmp_path, "start") == [0]


@pytest.mark.parametrize("scale", [2 * 10**11, 3 * 10**12])
def test_the_latest_are_kept_however_many_digits_their_steps_have(tmp_path, scale):
    averager = polyak.average({"w": torch.zeros(1)}, "swa")
    with Recorder(averager, tmp_path, every=scale, keep=3):
        for step in range(1, 13):
            averager.update(step=step * scale)
    assert steps(tmp_path, "average") == [10 * scale, 11 * scale, 12 * scale]


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
    assert steps(tmp_path, "average") == [10, 15]
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
    assert steps(tmp_path, "average") == [7]


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
    assert steps(tmp_path, "x")[-1] == max(s for s in range(78) if s % options.get("every", 1) == 0)
    made = quietly(tmp_path, "swa", start=max(options.get("start", 0), 1))
    exact = sum(share * step for share, step in zip(made.profile.shares, made.profile.steps, strict=True))
    # Between two updates the profile is spread over steps whose weights were not taken.
    assert made.state_dict["w"].item() == pytest.approx(exact, abs=options.get("every", 1))


def run_of(model, averager, steps_, *, given=None, values=float):
    for step in steps_:
        model["w"].fill_(values(step))
        averager.update(step=step if given else None)


def fresh(strategy="ema", **options):
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    return model, polyak.average(model, strategy, **options)


@pytest.mark.parametrize("stop", [1, 9, 10, 11, 35])
@pytest.mark.parametrize("strategy", ["ema", "power", "lawa"])
def test_a_run_that_was_resumed_with_its_state_writes_what_an_uninterrupted_one_does(
    tmp_path, stop, strategy, monkeypatch
):
    monkeypatch.setattr("polyak.posthoc.writer.uuid4", lambda: UUID(int=7))  # all else is the same, byte for byte
    model, averager = fresh(strategy)
    with Recorder(averager, tmp_path / "straight", every=10, blocks=True):
        run_of(model, averager, range(1, 48))
    model, averager = fresh(strategy)
    recorder = killed(Recorder(averager, tmp_path / "resumed", every=10, blocks=True))
    run_of(model, averager, range(1, stop + 1))
    saved = copy.deepcopy((averager.state_dict(), recorder.state_dict()))
    # Killed: nothing is closed.
    model, averager = fresh(strategy)
    with Recorder(averager, tmp_path / "resumed", every=10, blocks=True) as recorder:
        averager.load_state_dict(saved[0])
        recorder.load_state_dict(saved[1])
        run_of(model, averager, range(stop + 1, 48))
    assert files(tmp_path / "resumed") == files(tmp_path / "straight")
    for name in files(tmp_path / "straight"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


@pytest.mark.parametrize("stop", [9, 10, 14, 39])
def test_without_its_state_a_block_is_shorter_and_all_is_exact(tmp_path, stop):
    model, averager = fresh()
    killed(Recorder(averager, tmp_path, every=10))
    run_of(model, averager, range(1, stop + 1))
    saved = averager.state_dict()
    model, averager = fresh()
    averager.load_state_dict(saved)
    with Recorder(averager, tmp_path, every=10):
        run_of(model, averager, range(stop + 1, 51))
    assert_exact(tmp_path)
    assert steps(tmp_path, "average") == [10, 20, 30, 40, 50]
    block = next(s for s in series(tmp_path, "blocks") if s.step == -(-(stop + 1) // 10) * 10)
    assert block.profile.steps.tolist() == list(range(stop + 1, block.step + 1))
    made = quietly(tmp_path, "ema", decay=0.98)
    told = sum(share * step for share, step in zip(made.profile.shares, made.profile.steps, strict=True))
    assert made.state_dict["w"].item() == pytest.approx(told, rel=1e-12)


def test_a_stop_that_was_closed_leaves_a_short_block_and_loses_no_step(tmp_path):
    model, averager = fresh()
    with Recorder(averager, tmp_path, every=10):
        run_of(model, averager, range(1, 15))
    saved = averager.state_dict()
    model, averager = fresh()
    averager.load_state_dict(saved)
    with Recorder(averager, tmp_path, every=10):
        run_of(model, averager, range(15, 31))
    assert [s.profile.steps.tolist() for s in series(tmp_path, "blocks")] == [
        list(range(1, 11)), list(range(11, 15)), list(range(15, 21)), list(range(21, 31)),
    ]  # fmt: skip
    assert synthesize(tmp_path, "swa", start=11).profile_error < 1e-12
    assert_exact(tmp_path)


def test_steps_that_are_made_again_replace_their_snapshots_with_a_warning(tmp_path):
    model, averager = fresh()
    killed(Recorder(averager, tmp_path, every=10))
    run_of(model, averager, range(1, 26))
    saved = averager.state_dict()
    run_of(model, averager, range(26, 61))
    assert steps(tmp_path, "average") == [10, 20, 30, 40, 50, 60]
    model, averager = fresh()
    averager.load_state_dict(saved)
    with Recorder(averager, tmp_path, every=10):
        with pytest.warns(PolyakWarning, match="8 snapshots after step 25, where this run continues, are removed"):
            run_of(model, averager, [26])
        assert steps(tmp_path, "average") == [10, 20]
        run_of(model, averager, range(27, 36), values=lambda step: step)
    assert steps(tmp_path, "average") == [10, 20, 30, 35]
    assert_exact(tmp_path)


@pytest.mark.parametrize("with_state", [True, False])
def test_going_back_in_the_same_process_makes_the_steps_again(tmp_path, with_state):
    model, averager = fresh()
    recorder = Recorder(averager, tmp_path, every=10)
    run_of(model, averager, range(1, 26))
    saved = copy.deepcopy((averager.state_dict(), recorder.state_dict()))
    run_of(model, averager, range(26, 61))
    averager.load_state_dict(saved[0])
    if with_state:
        recorder.load_state_dict(saved[1])
    other = lambda step: 1000.0 + step if step > 25 else step
    with pytest.warns(PolyakWarning, match="8 snapshots after step 25"):
        run_of(model, averager, [26], values=other)
    run_of(model, averager, range(27, 44), values=other)
    recorder.close()
    assert steps(tmp_path, "average") == [10, 20, 30, 40, 43]
    assert_exact(tmp_path, other)
    first = series(tmp_path, "blocks")[2].profile.steps.tolist()
    assert first == list(range(21 if with_state else 26, 31))


def test_a_folder_of_another_run_is_refused(tmp_path):
    counted(tmp_path, 30)
    before = files(tmp_path)
    model, averager = fresh()
    recorder = Recorder(averager, tmp_path, every=10)
    for _ in range(2):
        with pytest.raises(StateError, match="holds 6 snapshots of another run, up to step 30"):
            run_of(model, averager, [1])
    recorder.close()
    assert files(tmp_path) == before
    assert_exact(tmp_path)


def test_a_folder_that_was_refused_is_taken_once_its_own_state_was_loaded(tmp_path):
    model, averager = fresh()
    with Recorder(averager, tmp_path, every=10):
        run_of(model, averager, range(1, 31))
    saved = averager.state_dict()
    model, averager = fresh()
    with Recorder(averager, tmp_path, every=10):
        with pytest.raises(StateError, match="load the state"):
            run_of(model, averager, [1])
        averager.load_state_dict(saved)
        run_of(model, averager, range(31, 41))
    assert steps(tmp_path, "average") == [10, 20, 30, 40]
    assert_exact(tmp_path)


def test_a_folder_of_another_model_is_refused_even_in_the_middle_of_a_run(tmp_path):
    counted(tmp_path, 30)
    model = mlp()
    averager = polyak.average(model)
    averager.update()
    averager.update()
    with Recorder(averager, tmp_path, every=10), pytest.raises(StateError, match="snapshots of another model"):
        averager.update()


def test_a_model_of_another_dtype_is_refused_by_the_name_of_its_dtype(tmp_path):
    model = mlp()
    averager = polyak.average(model, "swa")
    with Recorder(averager, tmp_path, every=1):
        averager.update()
    short = mlp().bfloat16()
    again = polyak.average(short, "swa")
    again.load_state_dict(averager.state_dict())
    name = next(iter(averager.averages))
    told = f"the dtypes of '{name}' are float32 and bfloat16"
    with Recorder(again, tmp_path, every=1), pytest.raises(StateError, match=told):
        again.update()


@pytest.mark.parametrize("value", [1e6, 1e-9])
def test_values_that_a_short_dtype_does_not_hold_are_kept_in_a_longer_one(tmp_path, value):
    model = {"far": torch.full((3,), value), "near": torch.ones(3)}
    averager = polyak.average(model, "swa")
    with Recorder(averager, tmp_path, every=1, dtype="float16"):
        with pytest.warns(
            PolyakWarning, match=r"the values of 'far' are too large or too small for float16.*\(1 now\)"
        ):
            averager.update()
        averager.update()  # says it once
    last = Store(tmp_path).snapshots[-1]
    assert {name: last.file.dtype(f"weights/{name}") for name in model} == {"far": torch.float32, "near": torch.float16}
    made = synthesize(tmp_path, "swa")
    assert all(torch.equal(made.state_dict[name], tensor) for name, tensor in model.items())


def test_a_bank_goes_on_where_one_of_its_averages_has_only_just_begun(tmp_path):
    wanted = {"late": {"name": "swa", "start": 36}, "slow": {"name": "ema", "every": 9}, "ema": "ema"}

    def built():
        model = {"w": torch.zeros(1, dtype=torch.float64)}
        return model, polyak.bank(model, wanted)

    model, bank = built()
    killed(Recorder(bank, tmp_path, every=7))
    run_of(model, bank, range(1, 36))
    saved = bank.state_dict()
    before = files(tmp_path)
    model, bank = built()
    bank.load_state_dict(saved)
    with Recorder(bank, tmp_path, every=7):
        run_of(model, bank, range(36, 51))  # the first one updates all three
    assert {*before} <= {*files(tmp_path)}
    assert steps(tmp_path, "ema") == [7, 14, 21, 28, 35, 42, 49, 50]
    assert_exact(tmp_path)


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
    assert steps(tmp_path / "a", "average") == [10, 20, 28]
    assert steps(tmp_path / "b", "average") == [7, 14, 21, 28]
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
    assert steps(tmp_path, "average") == [5, 10, 12]
    assert_exact(tmp_path)


def test_an_offloaded_average_is_recorded_without_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "crosses", lambda average, live: True)
    model, averager = fresh()
    with pytest.raises(ConfigError, match="block_mean"):
        Recorder(averager, tmp_path / "never", every=10, blocks=True)
    assert not (tmp_path / "never").exists()
    with Recorder(averager, tmp_path, every=10):
        run_of(model, averager, range(1, 26))
    assert steps(tmp_path, "average") == [10, 20, 25]
    assert not series(tmp_path, "blocks")
    assert_exact(tmp_path)
    assert threading.active_count() < 50


REFUSED = [
    ({"every": 0}, "every: got 0"),
    ({"every": 2.5}, "every: got 2.5"),
    ({"every": 5, "keep": 0}, "keep: got 0"),
    ({"every": 5, "blocks": 3}, "blocks: got 3"),
    ({"every": 5, "dtype": "int8"}, "int8"),
    ({"every": 5, "dtype": "float3"}, "float3"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_settings_are_refused_before_anything_is_made(tmp_path, settings, message):
    _, averager = fresh()
    with pytest.raises(ConfigError, match=message):
        Recorder(averager, tmp_path / "never", **settings)
    assert not (tmp_path / "never").exists()
    assert not averager.updater.listeners


def test_what_cannot_be_followed_is_refused_before_anything_is_made(tmp_path):
    model = mlp()
    never = tmp_path / "never"
    with pytest.raises(ConfigError, match="got <Sequential>"):
        Recorder(model, never, every=5)
    captured = polyak.average(model, capturable=True, nonfinite="propagate")
    with pytest.raises(ConfigError, match="captured graph"):
        Recorder(captured, never, every=5)
    bank = polyak.bank(model, {"all": "ema", "some": {"name": "ema", "exclude": "0.*"}})
    with pytest.raises(ConfigError, match="'some' averages other tensors than 'all'"):
        Recorder(bank, never, every=5)
    import pickle

    with pytest.raises(polyak.UnboundError, match="no model"):
        Recorder(pickle.loads(pickle.dumps(polyak.average(model))), never, every=5)
    for name in ("blocks", "start"):
        with pytest.raises(ConfigError, match=f"the names \\['{name}'\\]"):
            Recorder(polyak.bank(model, {name: "ema"}), never, every=5)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot be made"):
        Recorder(polyak.average(model), tmp_path / "file", every=5)
    assert not never.exists()


def test_a_state_of_something_else_is_refused(tmp_path):
    _, averager = fresh()
    with_blocks, without = (Recorder(averager, tmp_path, every=5, blocks=blocks) for blocks in (True, False))
    for wrong in ({}, None, averager.state_dict()):
        with pytest.raises(StateError, match=r"Recorder\.state_dict\(\) returned; got (the keys|NoneType)"):
            with_blocks.load_state_dict(wrong)
    with pytest.raises(StateError, match="another setting of blocks="):
        with_blocks.load_state_dict(without.state_dict())


@pytest.mark.parametrize("steps", [None, [1], {"average": "x"}, {5: 1}, {"average": True}], ids=str)
@pytest.mark.parametrize("part", ["seen", "written"])
def test_a_damaged_state_of_a_recorder_is_refused_whole(tmp_path, part, steps):
    model, averager = fresh(decay=0.9)
    with Recorder(averager, tmp_path / "run", every=5) as recorder:
        run_of(model, averager, range(1, 4))
        state, other = recorder.state_dict(), polyak.average(model, "ema", decay=0.9)
        with Recorder(other, tmp_path / "other", every=5) as later:
            before = later.state_dict()
            with pytest.raises(StateError, match="expected what Recorder"):
                later.load_state_dict({**state, part: steps})
            assert later.state_dict()["blocks"]["n"] == before["blocks"]["n"] == 0


def test_a_state_is_tensors_and_plain_types(tmp_path):
    import io

    model, averager = fresh()
    recorder = Recorder(averager, tmp_path, every=5)
    run_of(model, averager, range(1, 8))
    file = io.BytesIO()
    torch.save(recorder.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    recorder.load_state_dict(state)
    run_of(model, averager, range(8, 11))
    recorder.close()
    assert_exact(tmp_path)
    assert steps(tmp_path, "blocks") == [5, 10]


def test_halves_that_a_dead_process_left_are_cleared_away_and_other_files_are_not(tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / ".average-000000000010.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / ".unfinished" / ".tmpAbCdEf").write_bytes(b"half")
    (tmp_path / ".tmpAbCdEf").write_text("another process's")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden.tmp").write_text("mine")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "someone.safetensors")
    counted(tmp_path, 10)
    assert {"notes.txt", ".hidden.tmp", "someone.safetensors", ".tmpAbCdEf"} < {*files(tmp_path)}
    assert not (tmp_path / ".unfinished").exists()
    assert len(Store(tmp_path).snapshots) == 3


def test_a_snapshot_that_cannot_be_written_stops_neither_the_average_nor_the_next_ones(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    model, averager = fresh(decay=0.9)
    alone = polyak.average(model, "ema", decay=0.9)
    failed = {}
    with Recorder(averager, folder, every=5):
        for step in range(1, 31):
            if step == 8:
                folder.rename(away)
            if step == 17:
                away.rename(folder)
            model["w"].fill_(step)
            alone.update()
            try:
                averager.update()
            except SnapshotError as error:
                failed[step] = error
    assert all(isinstance(error, OSError) for error in failed.values())
    assert all("The average is whole and training can continue" in str(error) for error in failed.values())
    assert {step for step in failed if step % 5 == 0} == {10, 15}
    assert torch.equal(averager.averages["w"], alone.averages["w"])
    assert averager.n == 30
    assert {5, 20, 25, 30} <= {*steps(folder, "average")}
    assert_exact(folder)
    taken = [step for snapshot in series(folder, "blocks") for step in snapshot.profile.steps.tolist()]
    assert taken == list(range(1, 31))


def test_the_start_that_could_not_be_written_at_first_comes_later(tmp_path):
    folder = tmp_path / "run"
    model, averager = fresh(decay=0.9)
    with Recorder(averager, folder, every=5):
        folder.rmdir()
        with pytest.raises(SnapshotError, match="cannot be written to: No such file"):
            run_of(model, averager, [1])
        folder.mkdir()
        run_of(model, averager, range(2, 11))
    assert steps(folder, "start") == [0]
    assert_exact(folder)


def test_at_the_end_one_series_that_cannot_be_written_does_not_keep_the_others_from_it(tmp_path):
    model, bank = {"w": torch.zeros(1)}, None
    bank = polyak.bank(model, {"a": "swa", "b": "ema", "c": "ema"})
    recorder = Recorder(bank, tmp_path, every=10)
    for _ in range(15):
        bank.update()
    (tmp_path / "b-000000000015.safetensors").mkdir()
    with pytest.raises(SnapshotError, match="b-0"):
        recorder.close()
    (tmp_path / "b-000000000015.safetensors").rmdir()
    assert {snapshot.average for snapshot in Store(tmp_path).snapshots if snapshot.step == 15} == {"a", "c", "blocks"}
    recorder.close()
    assert {s.average for s in Store(tmp_path).snapshots if s.step == 15} == {"a", "b", "c", "blocks"}


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


def test_a_script_that_changes_its_directory_goes_on_in_the_folder_it_began_with(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    averager = polyak.average(mlp(), "ema", decay=0.9)
    with polyak.posthoc.Recorder(averager, "snapshots", every=10):
        for step in range(1, 31):
            averager.update(step=step)
            if step == 15:
                monkeypatch.chdir(tmp_path / "elsewhere")
    assert len([*(tmp_path / "snapshots").glob("average-*")]) == 3
    assert not [*(tmp_path / "elsewhere").iterdir()]
