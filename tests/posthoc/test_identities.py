"""Starts and histories are told apart by what they are, whatever is loaded, added or begun again."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

import polyak
from polyak import PolyakWarning, StateError
from polyak.posthoc import Recorder, Store, synthesize
from posthoc.runs import killed, quietly

EMA = {"name": "ema", "decay": 0.9}


def weights(value=0.0):
    return {"w": torch.full((1,), value, dtype=torch.float64)}


def steps_of(model, averager, steps, values=float):
    for step in steps:
        model["w"].fill_(values(step))
        averager.update(step=step)


def starts(folder):
    return {s.path.name: s.read_weights("w").item() for s in Store(folder).snapshots if s.is_start}


def value(made):
    return made.state_dict["w"].item()


def grown(folder, at=20, last=40, second=EMA):
    """Record a bank that starts from 100 and gains an average at a resume; return it and what ran beside it."""
    model = weights(100.0)
    beside = polyak.average(model, "ema", decay=0.95)
    bank = polyak.bank(model, {"a": EMA})
    with Recorder(bank, folder, every=5, blocks=True):
        for step in range(1, at + 1):
            model["w"].fill_(step)
            bank.update()
            beside.update()
    more = polyak.bank(model, {"a": EMA, "b": second})
    more["a"].load_state_dict(bank["a"].state_dict())
    with Recorder(more, folder, every=5, blocks=True):
        for step in range(at + 1, last + 1):
            model["w"].fill_(step)
            more.update(step=step)
            beside.update()
    return more, beside


def test_an_average_that_is_added_at_a_resume_starts_from_the_weights_then(tmp_path):
    bank, beside = grown(tmp_path)
    assert starts(tmp_path) == {"start-000000000000.safetensors": 100.0, "start-000000000020.safetensors": 20.0}
    assert len({snapshot.about.start for snapshot in Store(tmp_path).snapshots if not snapshot.is_start}) == 3
    for name in bank:
        made = synthesize(tmp_path, bank[name].profile())
        assert made.coefficients == {f"{name}-000000000040.safetensors": 1.0}
        assert value(made) == bank[name].averages["w"].item()
    exact = synthesize(tmp_path, "ema", decay=0.9, start=21, origin="initial")
    assert value(exact) == bank["b"].averages["w"].item()
    made = quietly(tmp_path, "ema", decay=0.95)
    assert made.profile_error < 0.05
    assert value(made) == pytest.approx(beside.averages["w"].item(), rel=0.03)


def test_a_start_that_is_not_known_yet_does_not_count_at_an_earlier_step(tmp_path):
    grown(tmp_path)
    made = quietly(tmp_path, "ema", decay=0.9, at_step=15)
    assert made.coefficients == {"a-000000000015.safetensors": 1.0}
    assert not any(snapshot.step > 15 for snapshot in Store(tmp_path).until(15)[0])


def test_a_run_that_goes_back_before_an_average_was_added_removes_its_start(tmp_path):
    model = weights(100.0)
    bank = polyak.bank(model, {"a": EMA})
    with Recorder(bank, tmp_path, every=5):
        steps_of(model, bank, range(1, 13))
        saved = bank["a"].state_dict()
        steps_of(model, bank, range(13, 21))
    more = polyak.bank(model, {"a": EMA, "b": EMA})
    more["a"].load_state_dict(bank["a"].state_dict())
    with Recorder(more, tmp_path, every=5):
        steps_of(model, more, range(21, 31))
    assert len(starts(tmp_path)) == 2
    again = polyak.bank(weights(), {"a": EMA})
    again["a"].load_state_dict(saved)
    with Recorder(again, tmp_path, every=5), pytest.warns(PolyakWarning, match="are removed"):
        again.update(step=13)
    assert starts(tmp_path) == {"start-000000000000.safetensors": 100.0}


def test_an_average_that_is_added_after_step_0_leaves_the_run_its_start(tmp_path):
    model = weights(100.0)
    bank = polyak.bank(model, {"a": EMA})
    with Recorder(bank, tmp_path, every=5):
        steps_of(model, bank, [0])
    model["w"].fill_(7.0)
    more = polyak.bank(model, {"a": EMA, "b": EMA})
    more["a"].load_state_dict(bank["a"].state_dict())
    with Recorder(more, tmp_path, every=5):
        steps_of(model, more, range(1, 11))
    assert sorted(starts(tmp_path).values()) == [7.0, 100.0]
    assert starts(tmp_path)["start-000000000000.safetensors"] == 100.0


def test_a_state_without_updates_is_known_in_a_wider_dtype(tmp_path):
    model = {"w": torch.full((1,), 0.1)}
    saved = polyak.average(model, "ema").state_dict()
    for dtype in ("float32", "float64"):
        averager = polyak.average(model, "ema", dtype=dtype)
        averager.load_state_dict(saved)
        recorder = killed(Recorder(averager, tmp_path, every=2))
        if dtype == "float32":
            steps_of(model, averager, range(1, 5))
            continue
        with pytest.warns(PolyakWarning, match="are removed"):
            steps_of(model, averager, range(1, 3))
        recorder.close()


def test_averages_of_other_dtypes_start_from_other_weights_and_equal_ones_share_a_file(tmp_path):
    model = weights(1.0 + 2**-40)
    bank = polyak.bank(model, {"a": EMA, "b": EMA, "short": {**EMA, "dtype": "float32"}})
    with Recorder(bank, tmp_path, every=5, keep=1, blocks=True):
        steps_of(model, bank, range(1, 11))
    assert sorted(starts(tmp_path).values()) == [1.0, 1.0 + 2**-40]
    assert bank["a"].identity.start == bank["b"].identity.start != bank["short"].identity.start


def test_averages_that_begin_together_from_other_weights_both_come_back_exactly(tmp_path):
    model = weights(1.0 + 2**-12)
    bank = polyak.bank(model, {"a": EMA, "short": {"name": "ema", "decay": 0.8, "dtype": "bfloat16"}})
    with Recorder(bank, tmp_path, every=5):
        steps_of(model, bank, range(1, 6))
    for name, decay in [("a", 0.9), ("short", 0.8)]:
        made = quietly(tmp_path, "ema", decay=decay)
        assert made.coefficients == {f"{name}-000000000005.safetensors": 1.0}
        assert value(made) == bank[name].averages["w"].item()


def test_a_start_is_taken_at_the_first_update(tmp_path):
    first = weights(7.0)
    averager = polyak.average(first, "ema", decay=0.9, every=10)
    steps_of(first, averager, range(1, 6), lambda _: 7.0)
    saved = averager.state_dict()
    model = weights(-1000.0)
    again = polyak.average(model, "ema", decay=0.9, every=10)
    with Recorder(again, tmp_path, every=20):
        again.load_state_dict(saved)
        steps_of(model, again, range(6, 101), lambda _: 7.0)
    assert starts(tmp_path) == {"start-000000000000.safetensors": 7.0}
    assert value(synthesize(tmp_path, "ema", decay=0.95, every=10)) == pytest.approx(7.0, rel=1e-12)


def test_an_average_of_a_bank_that_begins_later_has_its_start_from_the_first_update_of_any(tmp_path):
    model = weights(3.0)
    bank = polyak.bank(model, {"a": EMA, "rare": {**EMA, "every": 8}, "mean": "swa"})
    with Recorder(bank, tmp_path, every=5):
        steps_of(model, bank, range(1, 4))
        assert bank["rare"].n == 0
        assert starts(tmp_path) == {"start-000000000000.safetensors": 3.0}
        steps_of(model, bank, range(4, 21))
    assert starts(tmp_path) == {"start-000000000000.safetensors": 3.0}
    assert value(quietly(tmp_path, bank["rare"].profile())) == bank["rare"].averages["w"].item()


def test_averages_that_the_first_update_replaces_keep_the_weights_before_it_for_others(tmp_path):
    model = weights(5.0)
    averager = polyak.average(model, "swa")
    model["w"].fill_(6.0)  # a checkpoint of the model
    with Recorder(averager, tmp_path, every=5, blocks=True):
        steps_of(model, averager, range(1, 11))
    assert starts(tmp_path) == {"start-000000000000.safetensors": 6.0}


@pytest.mark.filterwarnings("ignore:the weights that the averager was built from:polyak.PolyakWarning")
def test_a_start_that_is_not_finite_gets_into_nothing(tmp_path):
    model = weights(float("nan"))
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, tmp_path, every=5, blocks=True):
        steps_of(model, averager, range(1, 31))
    assert starts(tmp_path) == {}
    assert value(synthesize(tmp_path, averager.profile())) == averager.averages["w"].item()
    assert value(synthesize(tmp_path, "swa")) == pytest.approx(15.5)


def test_an_average_that_replaces_another_under_its_name_has_a_history_of_its_own(tmp_path):
    model = weights(100.0)
    one = polyak.bank(model, {"a": EMA})
    with Recorder(one, tmp_path, every=5):
        steps_of(model, one, range(1, 21))
    two = polyak.bank(model, {"a": {**EMA, "decay": 0.5}, "b": EMA})
    two["b"].load_state_dict(one["a"].state_dict())
    with Recorder(two, tmp_path, every=5):
        steps_of(model, two, range(21, 41))
    for name in two:
        assert value(synthesize(tmp_path, two[name].profile())) == two[name].averages["w"].item()
    assert starts(tmp_path) == {"start-000000000000.safetensors": 100.0, "start-000000000020.safetensors": 20.0}


def recorded(folder, values=float, steps=50, strategy="ema", every=10, **options):
    model = weights()
    averager = polyak.average(model, strategy, **options)
    recorder = killed(Recorder(averager, folder, every=every))
    steps_of(model, averager, range(1, steps + 1), values)
    return model, averager, recorder


@pytest.mark.parametrize("strategy", ["ema", "swa"])
@pytest.mark.parametrize("every", [10, 25, None], ids=["as often", "less often", "not at all"])
def test_a_state_of_another_run_with_as_many_updates_is_refused_while_recording(tmp_path, every, strategy):
    model, averager, _ = recorded(tmp_path / "run", lambda _: 100.0, strategy=strategy)
    other = polyak.average(weights(), strategy)
    if every:
        _, other, _ = recorded(tmp_path / "other", lambda _: 0.0, strategy=strategy, every=every)
    else:
        steps_of(weights(), other, range(1, 51))
    own, before = averager.state_dict(), {path.name for path in (tmp_path / "run").iterdir()}
    averager.load_state_dict(other.state_dict())
    for step in (51, 60):
        with pytest.raises(StateError, match=r"is of another run than .*; expected .*record into a folder of its own"):
            steps_of(model, averager, [step], lambda _: 100.0)
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    averager.load_state_dict(own)
    steps_of(model, averager, range(51, 61), lambda _: 100.0)
    assert value(quietly(tmp_path / "run", "swa")) == pytest.approx(100.0)


@pytest.mark.parametrize("recorded_elsewhere", [True, False])
def test_a_state_of_another_run_that_is_older_than_every_snapshot_removes_none(tmp_path, recorded_elsewhere):
    model, averager, _ = recorded(tmp_path / "run")
    other_model = weights(8.0)
    other = polyak.average(other_model, "ema")
    if recorded_elsewhere:
        killed(Recorder(other, tmp_path / "other", every=10))
    steps_of(other_model, other, range(1, 4))
    before = {path.name for path in (tmp_path / "run").iterdir()}
    averager.load_state_dict(other.state_dict())
    with pytest.raises(StateError, match=r"it started from \w+"):
        steps_of(model, averager, [4])
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_one_average_of_a_bank_goes_back_and_is_resumed(tmp_path):
    def built():
        model = weights()
        return model, polyak.bank(model, {"a": EMA, "b": {**EMA, "decay": 0.99}})

    model, bank = built()
    killed(Recorder(bank, tmp_path, every=5))
    steps_of(model, bank, range(1, 13))
    saved = copy.deepcopy(bank["b"].state_dict())
    steps_of(model, bank, range(13, 23))
    bank["b"].load_state_dict(saved)
    steps_of(model, bank, range(23, 28))
    saved = bank.state_dict()
    model, bank = built()
    bank.load_state_dict(saved)
    with Recorder(bank, tmp_path, every=5):
        steps_of(model, bank, range(28, 41))
    for name in bank:
        assert value(synthesize(tmp_path, bank[name].profile())) == bank[name].averages["w"].item()


def test_a_branch_of_the_same_run_is_refused(tmp_path):
    model, averager, _ = recorded(tmp_path / "run", steps=25)
    branch_model, branch = weights(), polyak.average(weights(), "ema")
    branch.load_state_dict(averager.state_dict())
    shutil.copytree(tmp_path / "run", tmp_path / "branch")
    with Recorder(branch, tmp_path / "branch", every=10):
        for step in range(26, 46):
            branch_model["w"].fill_(-step)
            branch.update(branch_model, step=step)
    steps_of(model, averager, range(26, 46))
    averager.load_state_dict(branch.state_dict())
    with pytest.raises(StateError, match="is of another run"):
        averager.update()


def test_a_copy_and_a_pickle_of_a_recorded_average_go_on_with_its_run(tmp_path):
    import pickle

    model, averager, _ = recorded(tmp_path, steps=25)
    for other in (copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))):
        assert other.identity == averager.identity
        assert not other.updater.openers
        folder = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name} {id(other)}")
        other.update(model, step=26)
        with Recorder(other, folder, every=10):
            other.update(model, step=30)
        assert Store(folder).snapshots[-1].step == 30


@pytest.mark.parametrize("strategy", ["ema", "swa"])
@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("stop", [3, 17])
def test_what_close_wrote_after_the_state_was_saved_belongs_to_it(tmp_path, stop, keep, strategy):
    model, averager = weights(), polyak.average(weights(), strategy)
    averager = polyak.average(model, strategy)
    with Recorder(averager, tmp_path, every=5, keep=keep):
        steps_of(model, averager, range(1, stop + 1))
        saved = averager.state_dict()
    for _ in range(3):  # each is preempted after one step, which no multiple ends
        averager = polyak.average(model, strategy)
        averager.load_state_dict(saved)
        stop += 1
        with Recorder(averager, tmp_path, every=50, keep=keep):
            steps_of(model, averager, [stop])
            saved = averager.state_dict()
    assert value(quietly(tmp_path, averager.profile())) == averager.averages["w"].item()


@pytest.mark.parametrize("strategy", ["ema", "swa"])
@pytest.mark.parametrize("calls", [0, 5])
def test_a_requeued_job_that_had_no_averaged_update_makes_the_steps_again(tmp_path, calls, strategy):
    model = weights(7.0)
    averager = polyak.average(model, strategy, every=10)
    steps_of(model, averager, range(1, calls + 1))
    saved = averager.state_dict()

    def job(last, values=float):
        again = polyak.average(weights(-1.0), strategy, every=10)
        recorder = killed(Recorder(again, tmp_path, every=20))
        again.load_state_dict(saved)
        for step in range(calls + 1, last + 1):
            again.update(weights(values(step)), step=step)
        return again, recorder

    job(60)
    for _ in range(2):
        with pytest.warns(PolyakWarning, match="are removed"):
            again, recorder = job(50, lambda step: 2.0 * step)
    recorder.close()
    assert {snapshot.step for snapshot in Store(tmp_path).snapshots} == {0, 20, 40, 50}
    assert value(quietly(tmp_path, again.profile())) == again.averages["w"].item()


def test_a_state_without_updates_of_a_run_that_starts_elsewhere_is_refused(tmp_path):
    recorded(tmp_path)
    other = polyak.average(weights(8.0), "ema")
    again = polyak.average(weights(), "ema")
    again.load_state_dict(other.state_dict())
    before = {path.name for path in tmp_path.iterdir()}
    with Recorder(again, tmp_path, every=10), pytest.raises(StateError, match="started from other weights"):
        again.update()
    assert {path.name for path in tmp_path.iterdir()} == before


def test_two_recorders_of_one_average_with_other_intervals_and_dtypes_both_go_on(tmp_path):
    model, averager = weights(), None
    averager = polyak.average(model, "ema")
    options = [("a", {"every": 10}), ("b", {"every": 7, "dtype": "float16"})]
    for begin, end in [(1, 25), (26, 44), (45, 60)]:
        averager, saved = polyak.average(model, "ema"), averager.state_dict()
        averager.load_state_dict(saved)
        recorders = [Recorder(averager, tmp_path / name, **more) for name, more in options]
        steps_of(model, averager, range(begin, end + 1))
        for recorder in recorders:
            recorder.close()
    for name, steps in [("a", [10, 20, 25, 30, 40, 44, 50, 60]), ("b", [7, 14, 21, 25, 28, 35, 42, 44, 49, 56, 60])]:
        assert [s.step for s in Store(tmp_path / name).snapshots if s.average == "average"] == steps


def test_averages_that_are_moved_between_banks_keep_their_starts(tmp_path):
    model = weights(100.0)
    one = polyak.bank(model, {"a": EMA})
    with Recorder(one, tmp_path, every=5):
        steps_of(model, one, range(1, 11))
    two = polyak.bank(model, {"other": EMA, "late": EMA})
    two["other"].load_state_dict(one["a"].state_dict())
    with Recorder(two, tmp_path, every=5):
        steps_of(model, two, range(11, 21))
    assert two["other"].identity.start == one["a"].identity.start
    for name in two:
        assert value(synthesize(tmp_path, two[name].profile())) == two[name].averages["w"].item()
    fewer = polyak.bank(model, {"late": EMA})
    fewer["late"].load_state_dict(two["late"].state_dict())
    with Recorder(fewer, tmp_path, every=5):
        steps_of(model, fewer, range(21, 31))
    assert value(synthesize(tmp_path, fewer["late"].profile())) == fewer["late"].averages["w"].item()
