"""`Averager.configure`: settings that change in the middle of a run, recorded; nothing else of an averager is set."""

from __future__ import annotations

import copy
import pickle
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field

import polyak
from models import average_bits, drifting, mlp

CHANGES = {
    "ema": ({"decay": 0.9}, {"decay": 0.5}),
    "ema_debiased": ({"decay": 0.9}, {"decay": 0.99}),
    "ema_v1": ({"decay": 0.9}, {"decay": 0.8}),
    "ema_v3": ({"decay": 0.9, "use_warmup": True}, {"decay": 0.99, "min_decay": 0.3}),
    "ema_tf": ({"decay": 0.9}, {"decay": 0.6, "follow": 2}),
    "ema_halflife": ({"halflife": 3.0}, {"halflife": 30.0, "unit": "samples", "batch_size": 8}),
    "polynomial": ({"eta": 1.0}, {"eta": 8.0}),
    "power": ({"gamma": 6.0}, {"gamma": 3.0}),
    "tail": ({"fraction": 0.5}, {"fraction": 0.25, "total_steps": 20}),
    "block_mean": ({"length": 4}, {"length": 3}),
    "dema": ({"decay": 0.9}, {"decay": 0.5}),
    "swa": ({}, {"every": 2}),
}


def everything(averager):
    state = averager.state_dict()
    del state["slots"]
    return average_bits(averager), repr(averager.strategy), averager.options, repr(state)


def run(averager, model, steps):
    for _ in drifting(model, steps):
        averager.update()


@pytest.mark.parametrize("strategy", CHANGES)
def test_the_profile_is_exact_across_a_change(strategy):
    built, changed = CHANGES[strategy]
    model = mlp().double()
    averager = polyak.average(model, strategy, **built)
    seen = [{name: tensor.detach().clone() for name, tensor in model.named_parameters()}]
    for half in range(2):
        for _ in drifting(model, 8):
            n = averager.n
            averager.update()
            if averager.n > n:
                seen.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        if not half:
            averager.configure(**changed)
    profile = averager.profile()
    assert profile.start + profile.shares.sum() == pytest.approx(1.0)
    for name, average in averager.averages.items():
        expected = sum(share * w[name] for share, w in zip([profile.start, *profile.shares], seen, strict=True))
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def again(averager, model, way):
    """Return an averager that goes on from another one, in one of the ways that there are."""
    if way == "pickle":
        new = pickle.loads(pickle.dumps(averager))
        new.core.binding.model = model
        return new
    return copy.deepcopy(averager)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("way", ["state", "pt", "safetensors", "folder", "dcp", "pickle", "deepcopy"])
@pytest.mark.parametrize("strategy", CHANGES)
def test_a_resume_after_a_change_equals_a_run_without_it_bit_for_bit(strategy, way, tmp_path):
    built, changed = CHANGES[strategy]
    model = mlp()
    averager = polyak.average(model, strategy, **built)
    run(averager, model, 5)
    averager.configure(**changed)
    run(averager, model, 3)
    if way in {"pickle", "deepcopy"}:
        other = again(averager, model, way)
    else:
        other = polyak.average(model, strategy, **built)  # as the script builds it again
        if way == "state":
            other.load_state_dict(averager.state_dict())
        elif way == "dcp":
            dcp.save({"averager": averager}, checkpoint_id=tmp_path / "average")
            dcp.load({"averager": other}, checkpoint_id=tmp_path / "average")
        elif way == "folder":
            polyak.distributed.save(averager, tmp_path / "average")
            polyak.distributed.load(other, tmp_path / "average")
        else:
            polyak.save(averager, tmp_path / f"average.{way}")
            polyak.load(other, tmp_path / f"average.{way}")
    assert everything(other) == everything(averager)
    for _ in drifting(model, 5):
        averager.update()
        other.update()
    assert everything(other) == everything(averager)
    np.testing.assert_array_equal(other.profile().shares, averager.profile().shares)


def test_a_state_without_changes_is_as_it_was_before_there_were_any():
    averager = polyak.average(mlp(), "ema")
    averager.update()
    assert {*averager.state_dict()["history"][0]} == {"rates", "strides", "last"}


def test_two_changes_and_two_resumes_go_on_from_the_last():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9)
    for decay in (0.99, 0.5):
        run(averager, model, 2)
        averager.configure(decay=decay)
        state, averager = averager.state_dict(), polyak.average(model, "ema", decay=0.9)
        averager.load_state_dict(state)
    assert averager.strategy == polyak.EMA(decay=0.5)
    assert averager.state_dict()["history"][0]["changes"] == [[2, "decay", 0.9, 0.99], [4, "decay", 0.99, 0.5]]


def test_settings_that_the_script_gives_anew_win_with_a_warning_and_from_then_on_count_as_built():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9, every=1)
    averager.configure(decay=0.99, every=2)
    anew = polyak.average(model, "ema", decay=0.7)
    with pytest.warns(polyak.PolyakWarning, match=r"decay=0\.7 \(saved: 0\.99\)$"):
        anew.load_state_dict(averager.state_dict())
    assert (anew.strategy.decay, anew.options.every) == (0.7, 2)
    anew.configure(decay=0.8)
    last = polyak.average(model, "ema", decay=0.7)
    last.load_state_dict(anew.state_dict())
    assert (last.strategy.decay, last.options.every) == (0.8, 2)


def test_an_averager_built_with_the_changed_settings_loads_without_a_word():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9)
    averager.configure(decay=0.99)
    other = polyak.average(model, "ema", decay=0.99)
    other.load_state_dict(averager.state_dict())
    assert other.strategy.decay == 0.99


def test_an_earlier_state_brings_its_settings_back():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9)
    run(averager, model, 2)
    state = averager.state_dict()
    averager.configure(decay=0.99)
    averager.load_state_dict(state)
    assert averager.strategy.decay == 0.9
    assert "changes" not in averager.state_dict()["history"][0]


def test_the_members_of_a_bank_change_by_themselves_and_resume():
    model = mlp()
    build = lambda: polyak.bank(model, {"short": {"name": "ema", "decay": 0.9}, "mean": "swa"})
    bank, other = build(), build()
    for _ in drifting(model, 2):
        bank.update()
    bank["short"].configure(decay=0.5, every=2)
    for _ in drifting(model, 2):
        bank.update()
    assert (bank["short"].n, bank["short"].rate, bank["mean"].n) == (3, 0.75, 4)
    other.load_state_dict(bank.state_dict())
    assert other["short"].strategy.decay == 0.5
    for _ in drifting(model, 2):
        bank.update()
        other.update()
    assert [everything(other[name]) for name in other] == [everything(bank[name]) for name in bank]


def test_a_change_of_the_cadence_counts_from_the_next_update():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    run(averager, model, 3)
    averager.configure(every=4)
    run(averager, model, 6)
    assert averager.profile().steps.tolist() == [1, 2, 3, 4, 8]
    averager.configure(start=12)
    run(averager, model, 4)
    assert averager.profile().steps.tolist() == [1, 2, 3, 4, 8, 12]
    assert averager.rate == 1 - 0.5**4


def test_what_becomes_of_weights_that_are_not_finite_can_change():
    model = mlp()
    averager = polyak.average(model, "ema", nonfinite="raise")
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(polyak.NonFiniteError):
        averager.update()
    averager.configure(nonfinite="skip")
    with pytest.warns(polyak.PolyakWarning, match="NaN"):
        averager.update()
    assert averager.skipped == 1


class Anchored(polyak.Strategy):
    """Half of the first weights, as a setting says."""

    name: Literal["anchored"] = "anchored"
    pull: Annotated[float, Field(ge=0, le=1)] = 0.5

    def rate(self, clock):
        return 0.5

    def slots(self):
        return ("ema",)

    def moves(self, n, rate):
        return polyak.Move("ema", "weights", rate), polyak.Move("average", "ema", self.pull)

    def shares(self, rates):
        return polyak.Shares(rates * 0.0, 1.0)


REFUSED = [
    ("ema", {"decay": 2.0}, ["decay", "less than 1", "2.0"]),
    ("ema", {"decay": 0.5, "every": 0}, ["every", "greater than 0"]),
    ("ema", {"dekay": 0.5}, ["there is no such setting", "Did you mean 'decay'?", "every"]),
    ("ema", {"name": "swa"}, ["keeps its strategy, 'ema'"]),
    ("ema", {"strategy": "swa"}, ["keeps its strategy"]),
    ("ema", {"device": "cpu"}, ["device: fixed when an averager is built"]),
    ("ema", {"origin": "first"}, ["origin: fixed"]),
    ("ema", {"buffers": "copy", "decay": 0.5}, ["buffers: fixed"]),
    ("ema_v3", {"exclude_buffers": True}, ["exclude_buffers=True decides how tensors are kept"]),
    ("ema_halflife", {"unit": "samples"}, ["unit='samples' needs batch_size="]),
    ("power", {"gamma": 3.0}, ["not by both"]),
    ("lawa", {"window": 3}, ["keeps several tensors", "window=3"]),
    (Anchored(), {"pull": 0.25}, ["keeps several tensors", "pull=0.25"]),
]


@pytest.mark.parametrize(("strategy", "settings", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_change_is_refused_in_words_and_nothing_has_changed(strategy, settings, words):
    model = mlp()
    more = {"halflife": 3.0} if strategy == "ema_halflife" else {}
    averager = polyak.average(model, strategy, **more)
    run(averager, model, 3)
    before = everything(averager)
    with pytest.raises(polyak.ConfigError) as caught:
        averager.configure(**settings)
    for word in words:
        assert word in str(caught.value)
    assert everything(averager) == before
    run(averager, model, 1)


def test_the_width_of_a_power_function_can_be_given_the_other_way():
    averager = polyak.average(mlp(), "power", sigma_rel=0.1)
    averager.configure(sigma_rel=None, gamma=3.0)
    assert averager.strategy == polyak.PowerEMA(gamma=3.0)


def test_a_captured_graph_fixes_the_cadence_and_not_the_rate():
    model = mlp()
    averager = polyak.average(model, "ema", capturable=True, nonfinite="propagate")
    with pytest.raises(polyak.ConfigError, match="every: capturable=True fixes it"):
        averager.configure(every=2)
    averager.configure(decay=0.5)
    averager.advance()
    assert averager.rate == 0.5


def test_nothing_changes_where_nothing_is_given_or_the_same():
    averager = polyak.average(mlp(), "ema", decay=0.5)
    before = everything(averager)
    averager.configure()
    averager.configure(decay=0.5, every=1)
    assert everything(averager) == before


def test_a_change_while_the_average_is_applied_counts_from_the_next_update():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    run(averager, model, 1)
    with averager.applied():
        averager.configure(decay=0.75)
    run(averager, model, 1)
    assert averager.rate == 0.25


ASSIGNED = [
    ("decay", r"call averager\.configure\(decay=\.\.\.\)"),
    ("every", r"call averager\.configure\(every=\.\.\.\)"),
    ("dekay", r"configure\(\.\.\.\)\. Did you mean 'decay'\?"),
    ("device", "fixed when an averager is built"),
    ("n", "'n' cannot be set"),
    ("rate", "'rate' cannot be set"),
    ("strategy", "'strategy' cannot be set"),
    ("anything", "'anything' cannot be set"),
]


@pytest.mark.parametrize(("name", "words"), ASSIGNED)
@pytest.mark.parametrize("how", ["built", "unpickled", "copied"])
def test_an_assignment_is_an_error_that_names_configure(name, words, how):
    averager = polyak.average(mlp(), "ema", decay=0.9)
    if how == "unpickled":
        averager = pickle.loads(pickle.dumps(averager))
    elif how == "copied":
        averager = copy.deepcopy(averager)
    before = everything(averager)
    with pytest.raises(AttributeError, match=words):
        setattr(averager, name, 0.5)
    assert everything(averager) == before


@pytest.mark.parametrize("name", ["decay", "every", "short", "anything"])
def test_an_assignment_to_a_bank_is_an_error_that_names_its_members(name):
    bank = polyak.bank(mlp(), {"short": "ema"})
    with pytest.raises(AttributeError, match=rf"the bank's {name!r} cannot be set.*bank\['short'\]\.configure"):
        setattr(bank, name, 0.5)
    assert pickle.loads(pickle.dumps(bank)).keys() == bank.keys()
