"""A recorder goes on with its run, makes steps again, and refuses the folders of other runs."""

from __future__ import annotations

import copy
from uuid import UUID

import pytest
import torch

import polyak
from models import mlp
from polyak import PolyakWarning, StateError
from polyak.posthoc import Recorder, Store, synthesize
from posthoc.runs import counted, killed, quietly
from recording import assert_exact, files, fresh, run_of, series, steps_of


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
    assert steps_of(tmp_path, "average") == [10, 20, 30, 40, 50]
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
    assert steps_of(tmp_path, "average") == [10, 20, 30, 40, 50, 60]
    model, averager = fresh()
    averager.load_state_dict(saved)
    with Recorder(averager, tmp_path, every=10):
        with pytest.warns(PolyakWarning, match="8 snapshots after step 25, where this run continues, are removed"):
            run_of(model, averager, [26])
        assert steps_of(tmp_path, "average") == [10, 20]
        run_of(model, averager, range(27, 36), values=lambda step: step)
    assert steps_of(tmp_path, "average") == [10, 20, 30, 35]
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
    assert steps_of(tmp_path, "average") == [10, 20, 30, 40, 43]
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
    assert steps_of(tmp_path, "average") == [10, 20, 30, 40]
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
    assert steps_of(tmp_path, "ema") == [7, 14, 21, 28, 35, 42, 49, 50]
    assert_exact(tmp_path)


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
