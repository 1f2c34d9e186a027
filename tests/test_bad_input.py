"""Bad input is refused with a message that says what to do, and nothing was written."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
from contextlib import contextmanager
from operator import attrgetter
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import nn

import polyak
from models import ZOO, Conv, average_bits, drifting, mlp, model_bits
from polyak.errors.formatting import shown
from polyak.registry.hookspecs import hookimpl


def everything(averager):
    state = averager.state_dict()
    del state["slots"]
    return average_bits(averager), repr(state)


@contextmanager
def refused(averager, error, *words):
    """Expect an error whose message holds all of ``words``, and an averager that is as before."""
    before = everything(averager)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert everything(averager) == before


def _used(model, strategy="ema", steps=2, **options):
    averager = polyak.average(model, strategy, **options)
    for _ in drifting(model, steps):
        averager.update()
    return averager


# Strategies and settings


def test_an_unknown_strategy_answers_with_the_nearest_name_and_the_known_ones():
    with pytest.raises(polyak.UnknownStrategyError) as caught:
        polyak.average(mlp(), "ema_v4")
    message = str(caught.value)
    assert "no strategy is called 'ema_v4'" in message
    assert re.search(r"Did you mean 'ema_v\d'\?", message)
    for name in ("ema", "ema_debiased", "ema_v1", "ema_v2", "ema_v3", "swa"):
        assert name in message
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_strategy_names_the_plugins_that_failed_and_why(tmp_path, monkeypatch):
    from importlib.metadata import EntryPoint

    from polyak.registry import Registry

    (tmp_path / "broken_plugin.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry([EntryPoint("broken", "broken_plugin", "polyak")], strict=False, disabled=frozenset())
    with pytest.raises(polyak.UnknownStrategyError) as caught:
        registry.resolve("wanted")
    assert "broken" in str(caught.value)
    assert "no_such_module_anywhere" in str(caught.value)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "high", None])
@pytest.mark.parametrize("strategy", ["ema", "ema_debiased", "ema_v1", "ema_v2", "ema_v3"])
def test_a_decay_outside_its_range_names_the_setting_and_what_was_got(strategy, decay):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), strategy, decay=decay)
    assert "strategy.decay" in str(caught.value)
    assert repr(decay) in str(caught.value)


def test_a_misspelt_setting_names_the_nearest_one():
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), "ema", decya=0.9)
    assert "strategy.decya" in str(caught.value)
    assert "Did you mean 'decay'?" in str(caught.value)


def test_a_misspelt_option_names_the_nearest_one():
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), "ema", stard=5)
    assert "Did you mean 'start'?" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, ["every", "0"]),
        ({"start": -1}, ["start", "-1"]),
        ({"origin": "last"}, ["origin", "'initial'", "'first'", "'last'"]),
        ({"buffers": "avarage"}, ["buffers", "avarage"]),
        ({"match": "shape"}, ["match", "'name'", "'order'", "'shape'"]),
        ({"kernel": "fast"}, ["kernel", "'foreach'", "'fast'"]),
        ({"nonfinite": "ignore"}, ["nonfinite", "'skip'", "'ignore'"]),
        ({"dtype": "float33"}, ["dtype", "float33", "float32"]),
        ({"dtype": torch.int64}, ["dtype", "int64", "float32"]),
        ({"device": "gpu"}, ["device", "gpu", "cpu"]),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_names_it_what_was_got_and_what_is_allowed(options, words):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), "ema", **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("strategy", [nn.Linear, None, 5, ["ema"]], ids=repr)
def test_what_is_no_strategy_is_refused_in_words(strategy):
    with pytest.raises(polyak.ConfigError, match="strategy"):
        polyak.average(mlp(), strategy)


def test_settings_beside_a_strategy_object_are_refused():
    with pytest.raises(polyak.ConfigError, match=r"'decay' .*set them on it"):
        polyak.average(mlp(), polyak.EMA(), decay=0.5)


@pytest.mark.parametrize("reserved", ["every", "start", "model", "dtype", "strategy"])
def test_a_strategy_may_not_define_a_reserved_setting(reserved):
    with pytest.raises(TypeError, match=f"'{reserved}'.*choose another name"):
        type("Bad", (polyak.Strategy,), {"__annotations__": {reserved: int}, reserved: 1, "rate": lambda s, c: 0.5})


# Config files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.toml", None, ["absent.toml", "cannot be read"]),
        ("broken.toml", "strategy = [", ["broken.toml", "not valid TOML"]),
        ("broken.json", "{", ["broken.json", "not valid JSON"]),
        ("broken.yaml", "a: [", ["broken.yaml", "not valid YAML"]),
        ("list.json", "[1]", ["list.json", "list", "strategy"]),
        ("empty.yaml", "", ["empty.yaml", "expected a table"]),
        ("average.ini", "", ["average.ini", "'.ini'", ".toml", ".yaml", ".json"]),
        ("average", "", ["(none)", ".toml"]),
        ("key.toml", "evry = 2\n", ["key.toml", "evry", "Did you mean 'every'?"]),
        ("value.toml", '[strategy]\nname = "ema"\ndecay = 2.0\n', ["strategy", "decay", "2.0"]),
        ("inner.yaml", "strategy: {name: ema, dekay: 0.5}", ["strategy", "dekay", "Did you mean 'decay'?"]),
        ("strategy.json", json.dumps({"strategy": "emma"}), ["no strategy is called 'emma'", "Did you mean"]),
        ("nameless.json", json.dumps({"strategy": {"decay": 0.5}}), ["strategy", "name"]),
    ],
)
def test_a_config_file_that_cannot_be_used_says_where_and_why(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.AveragerConfig.from_file(path)
    for word in words:
        assert word in str(caught.value)


def test_a_config_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "average.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(polyak.ConfigError, match="cannot be read"):
        polyak.AveragerConfig.from_file(path)


# Models


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), {}], ids=str)
def test_a_model_without_tensors_is_refused(model):
    with pytest.raises(polyak.ModelError, match="no parameters and no buffers"):
        polyak.average(model)


def test_a_model_with_nothing_to_average_is_refused():
    with pytest.raises(polyak.ModelError, match="nothing is left to average"):
        polyak.average({"count": torch.tensor(1)})


@pytest.mark.parametrize(
    "model", [[torch.ones(1)], torch.ones(1), None, "model", nn.Linear], ids=lambda m: type(m).__name__
)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(polyak.ModelError, match=r"a model is a torch\.nn\.Module or a mapping"):
        polyak.average(model)


def test_a_mapping_of_other_things_is_refused():
    with pytest.raises(polyak.ModelError, match="got int at 'a'"):
        polyak.average({"a": 1})


@pytest.mark.parametrize(
    "build", [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d, lambda: nn.LazyConv2d(3, 3)], ids=["linear", "norm", "conv"]
)
def test_a_lazy_model_is_asked_to_run_once(build):
    with pytest.raises(polyak.ModelError, match=r"not initialised yet .*run one forward pass"):
        polyak.average(build())


@pytest.mark.parametrize("layer", [nn.Linear(2, 2, device="meta"), nn.BatchNorm1d(2, device="meta")], ids=str)
def test_a_model_on_the_meta_device_is_asked_to_be_materialised(layer):
    with pytest.raises(polyak.ModelError, match=r"meta device .*materialise"):
        polyak.average(layer)


def test_meta_buffers_alone_are_refused_too():
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2, device="meta"))
    with pytest.raises(polyak.ModelError, match="scale is on the meta device"):
        polyak.average(model)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_sparse_tensor_is_refused_and_can_be_left_out(kind):
    model = nn.Linear(2, 2)
    sparse = torch.eye(3).to_sparse()
    if kind == "buffer":
        model.register_buffer("table", sparse)
    else:
        model.table = nn.Parameter(sparse)
    with pytest.raises(polyak.ModelError, match=r"table is sparse .*exclude="):
        polyak.average(model)
    averager = polyak.average(model, exclude="table")
    averager.update()
    with averager.applied():
        assert averager.n == 1


@pytest.mark.parametrize("option", ["include", "exclude", "buffers"])
def test_a_glob_that_matches_nothing_shows_names_that_exist(option):
    globs = {"hed.*": "copy"} if option == "buffers" else ["hed.*"]
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(Conv(), **{option: globs})
    assert f"{option}: the glob 'hed.*' matches none of the" in str(caught.value)
    assert ("norm.running_mean" if option == "buffers" else "head.weight") in str(caught.value)


@pytest.mark.parametrize("start", [0.75, 0.1])
def test_a_start_that_is_a_part_of_the_run_says_where_that_works_and_what_to_write(start):
    words = rf"start: .*command line only.*start=round\({start} \* steps\) \+ 1"
    with pytest.raises(polyak.ConfigError, match=words):
        polyak.average(mlp(), "swa", start=start)
    with pytest.raises(polyak.ConfigError, match=r"start: (?!.*command line)"):
        polyak.average(mlp(), "swa", start=1.5)


# Updates with another model


def _lost():
    model = mlp()
    model[2] = nn.Linear(5, 2, bias=False)
    return model


def _gained():
    model = mlp()
    model.append(nn.Linear(2, 2))
    return model


def _reshaped():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))


def _renamed():
    first, relu, second = mlp()
    return nn.Sequential(nn.Identity(), first, relu, second)


def _reordered():
    model = nn.Module()
    model.add_module("2", nn.Linear(5, 2))
    model.add_module("0", nn.Linear(3, 5))
    return model


CHANGED = [
    (_lost, "missing: 2.bias"),
    (_gained, "new: 3.weight"),
    (_reshaped, "reshaped: 2.weight is (3, 5) and was (2, 5)"),
]


@pytest.mark.parametrize(("build", "words"), CHANGED, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("match", ["name", "order"])
def test_an_update_with_a_model_of_another_structure_is_refused(build, words, match):
    averager = _used(mlp(), match=match)
    with refused(averager, polyak.MismatchError, words, "Nothing was changed"):
        averager.update(build())
    averager.update()


def test_a_renamed_model_is_refused_by_name_and_by_order_where_some_names_stayed():
    averager = _used(mlp())
    with refused(averager, polyak.MismatchError, "missing: 0.weight", "new: 1.weight"):
        averager.update(_renamed())
    averager = _used(mlp(), "ema_v2")
    partly = mlp()
    partly[1], partly[2] = partly[2], nn.Identity()
    with refused(averager, polyak.MismatchError, "missing: 2.weight", "new: 1.weight"):
        averager.update(partly)


def test_a_model_with_other_names_altogether_is_taken_by_order():
    averager = _used(mlp(), "ema_v2")
    averager.update(_renamed())
    assert averager.n == 3
    with refused(averager, polyak.MismatchError, "3 tensors where 4 were expected"):
        averager.update({"a": torch.ones(5, 3), "b": torch.ones(5), "c": torch.ones(2, 5)})
    with refused(averager, polyak.MismatchError, "reshaped: d is (3,) and was (2,)"):
        averager.update({"a": torch.ones(5, 3), "b": torch.ones(5), "c": torch.ones(2, 5), "d": torch.ones(3)})


def test_modules_that_changed_places_are_refused_when_matched_by_order():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    averager = _used(nn.ModuleDict({"a": model[0], "b": model[1]}), "ema_v2")
    with refused(averager, polyak.MismatchError, "moved: a.weight"):
        averager.update(nn.ModuleDict({"b": model[1], "a": model[0]}))


def test_modules_that_changed_places_are_followed_when_matched_by_name():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    averager = _used(nn.ModuleDict({"a": model[0], "b": model[1]}), "ema")
    averager.update(nn.ModuleDict({"b": model[1], "a": model[0]}))
    assert averager.n == 3


@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 1), ()])
def test_a_shape_that_would_broadcast_is_refused(shape):
    weights = {"w": torch.ones(5, 5), "v": torch.ones(2)}
    averager = polyak.average(weights)
    with refused(averager, polyak.MismatchError, "reshaped: w"):
        averager.update({"w": torch.zeros(shape), "v": torch.zeros(2)})


@pytest.mark.parametrize("change", ["lost", "gained", "reshaped", "renamed"])
def test_a_change_of_the_own_model_is_refused_and_undoing_it_goes_on(change):
    model = mlp()
    averager = _used(model)
    kept = model[2]
    if change == "lost":
        model[2] = nn.Identity()
    elif change == "gained":
        model[2].register_parameter("extra", nn.Parameter(torch.ones(1)))
    elif change == "reshaped":
        model[2].weight = nn.Parameter(torch.ones(1, 5))
    else:
        del model[2]
        model.add_module("last", kept)
    kept_weight = averager.averages["2.weight"].clone()
    with refused(averager, polyak.MismatchError, "Nothing was changed"):
        averager.update()
    with refused(averager, polyak.MismatchError, "Nothing was changed"), averager.applied():
        pass
    with refused(averager, polyak.MismatchError, "Nothing was changed"):
        averager.averaged_state_dict()
    if change == "renamed":
        del model.last
    if change == "gained":
        del kept.extra
    if change == "reshaped":
        kept.weight = nn.Parameter(torch.ones(2, 5))
    model.add_module("2", kept)
    averager.update()
    assert not torch.equal(averager.averages["2.weight"], kept_weight)


def test_a_refused_update_leaves_the_given_model_alone():
    averager, other = _used(mlp()), _reshaped()
    before = model_bits(other)
    with refused(averager, polyak.MismatchError):
        averager.update(other)
    with refused(averager, polyak.MismatchError):
        averager.copy_to(other)
    assert model_bits(other) == before


def test_a_parameter_that_became_an_integer_is_refused():
    averager = polyak.average({"w": torch.ones(3), "v": torch.ones(1)})
    with refused(averager, polyak.MismatchError, "retyped: w is torch.int64"):
        averager.update({"w": torch.ones(3, dtype=torch.int64), "v": torch.ones(1)})


def test_a_real_parameter_that_became_complex_is_refused():
    averager = polyak.average({"w": torch.ones(3), "v": torch.ones(1)})
    with refused(averager, polyak.MismatchError, "retyped: w is torch.complex64"):
        averager.update({"w": torch.ones(3, dtype=torch.complex64), "v": torch.ones(1)})


# Calls that need the model's own weights


def test_nothing_that_needs_the_models_own_weights_runs_inside_applied():
    model = mlp()
    averager = _used(model)
    state = averager.state_dict()
    with averager.applied():
        with refused(averager, polyak.AppliedError, "update() while the model holds the average", "leave applied()"):
            averager.update()
        with refused(averager, polyak.AppliedError, "update()"):
            averager.update(mlp())
        with refused(averager, polyak.AppliedError, "copy_to() while the model holds the average"):
            averager.copy_to()
        with refused(averager, polyak.AppliedError, "load_state_dict()"):
            averager.load_state_dict(state)
        with refused(averager, polyak.AppliedError, "no weights to start from", "leave applied()"):
            polyak.average(model)
    averager.update()


def test_an_averager_without_a_model_says_so():
    import pickle

    model = mlp()
    averager = pickle.loads(pickle.dumps(_used(model)))
    for call in (averager.update, averager.copy_to, averager.averaged_state_dict, lambda: averager.module):
        with refused(averager, polyak.UnboundError, "no model", "averager.update(model)"):
            call()
    averager.update(model)
    assert averager.averaged_state_dict().keys() == model.state_dict().keys()


STEPS = [
    1.5,
    3.0,
    "3",
    -1,
    True,
    np.bool_(1),
    torch.tensor(True),
    torch.tensor(1.5),
    torch.tensor([1, 2]),
    2**63,
    2**64,
]


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_a_step_that_is_no_count_is_refused_before_anything_moves(step):
    model = mlp()
    averager = _used(model)
    bank = polyak.bank(model, {"one": "swa", "other": {"name": "ema", "decay": 0.5}})
    bank.update()
    for _ in drifting(model, 1):
        with refused(averager, polyak.ConfigError, "step: got", "expected the count of optimiser steps so far"):
            averager.update(step=step)
        for member in bank.values():
            with refused(member, polyak.ConfigError, "step: got"):
                bank.update(step=step)


@pytest.mark.parametrize(
    "step", [7, np.int32(7), np.uint64(7), np.array(7), torch.tensor(7), torch.tensor([7])], ids=repr
)
def test_a_step_of_numpy_or_torch_is_an_integer_and_is_saved_as_one(step):
    averager = _used(mlp())
    averager.update(step=step)
    assert averager.state_dict()["step"] == 7
    assert type(averager.state_dict()["step"]) is int


def test_steps_that_add_up_to_more_than_the_history_holds_are_refused():
    averager = polyak.average(mlp(), "ema", decay=0.5)
    averager.update(step=1)
    averager.update(step=2**62)
    assert averager.profile().steps.tolist() == [1, 2**62]
    with pytest.warns(polyak.PolyakWarning, match="went back"):
        averager.update(step=5)
    with refused(averager, polyak.ConfigError, "averaged steps in all"):
        averager.update(step=2**63 - 1)
    for option in ("every", "start"):
        with pytest.raises(polyak.ConfigError, match=rf"{option}: Input should be less than .*\(got 1844"):
            polyak.average(mlp(), "ema", **{option: 2**64})


def test_a_step_that_is_counted_past_the_largest_is_refused():
    averager = polyak.average(mlp(), "ema", decay=0.5)
    averager.update(step=2**63 - 1)
    with refused(averager, polyak.ConfigError, "step: got 9223372036854775808"):
        averager.update()


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), "0.1", True, torch.tensor([0.1, 0.2]), [0.1], 1j], ids=repr)
def test_a_learning_rate_that_is_no_finite_number_is_refused_before_anything_moves(lr):
    averager = _used(mlp())
    with refused(averager, polyak.ConfigError, "lr: got", "expected the learning rate of this step, a finite number"):
        averager.update(lr=lr)


@pytest.mark.parametrize("lr", [0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor([0.25]), 1, 0])
def test_a_learning_rate_of_numpy_or_torch_is_a_float(lr):
    seen = []

    class Looking(polyak.SWA):
        def weight(self, clock):
            seen.append(clock.lr)
            return 1.0

    averager = polyak.average(mlp(), Looking())
    averager.update(lr=lr)
    assert seen == [float(lr)]
    assert type(seen[0]) is float


# States


def _other_strategy(state):
    return polyak.average(mlp(), "swa").state_dict()


def _without(*keys):
    def cut(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return cut


def _set(value, *keys):
    def put(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return put


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_set(3, "format"), ["format 3", "upgrade polyak"]),
        (_set("1", "format"), ["expected what averager.state_dict() returned"]),
        (_without("format"), ["expected what averager.state_dict() returned"]),
        (_without("slots"), ["damaged or incomplete", "slots"]),
        (_without("slots", "average"), ["damaged or incomplete", "average"]),
        (_without("slots", "average", "2.bias"), ["another model", "missing: 2.bias"]),
        (_set(torch.ones(1), "slots", "average", "extra"), ["another model", "unknown: extra"]),
        (_set(torch.ones(1), "slots", "average", "2.bias"), ["reshaped: 2.bias is (1,), expected (2,)"]),
        (_set(torch.ones(2, dtype=torch.int64), "slots", "average", "2.bias"), ["retyped: 2.bias"]),
        (_set(torch.ones(2, dtype=torch.complex64), "slots", "average", "2.bias"), ["retyped: 2.bias"]),
        (_set([1.0, 2.0], "slots", "average", "2.bias"), ["damaged: 2.bias is list"]),
        (_without("progress"), ["damaged or incomplete", "progress"]),
        (_without("progress", "n"), ["damaged"]),
        (_set("x", "progress", "n"), ["damaged"]),
        (_set(1, "progress", "surprise"), ["damaged or incomplete", "surprise"]),
        (_without("history"), ["damaged or incomplete", "history"]),
        (_set((torch.ones(5),), "history"), ["damaged or incomplete"]),
        (_set((torch.ones(5), torch.ones(1), torch.ones(1)), "history"), ["damaged"]),
        (_set(7, "n"), ["damaged", "7"]),
        (_without("n"), ["damaged", "n"]),
        (_set(None, "skipped"), ["damaged or incomplete"]),
        (_without("strategy"), ["names no strategy"]),
        (_set({"decay": 0.5}, "strategy"), ["names no strategy"]),
        (_set({"name": "swa"}, "strategy"), ["made by the strategy 'swa'", "uses 'ema'"]),
        (_set((("cpu", torch.ones(3, dtype=torch.uint8)),), "generators"), ["damaged or incomplete"]),
        (_set((("nowhere", torch.ones(3, dtype=torch.uint8)),), "generators"), ["damaged or incomplete"]),
    ],
)
def test_a_damaged_state_is_refused_whole(damage, words):
    averager, other = _used(mlp()), _used(mlp(), steps=3)
    state = other.state_dict()
    damage(state)
    with refused(averager, polyak.StateError, *words):
        averager.load_state_dict(state)
    averager.update()


@pytest.mark.parametrize("state", [None, [], "state", {}, {"weight": torch.ones(1)}, 3], ids=str)
def test_what_is_no_state_is_refused(state):
    averager = _used(mlp())
    with refused(averager, polyak.StateError, "expected what averager.state_dict() returned"):
        averager.load_state_dict(state)


def test_a_state_of_another_model_is_refused():
    averager = _used(mlp())
    with refused(averager, polyak.StateError, "another model", "missing: 0.weight", "Nothing was loaded"):
        averager.load_state_dict(_used(Conv()).state_dict())


def test_a_model_s_own_state_dict_is_refused():
    model = mlp()
    averager = _used(model)
    with refused(averager, polyak.StateError, "0.bias"):
        averager.load_state_dict(model.state_dict())


@pytest.mark.parametrize("names", [("ema", "swa"), ("swa", "ema"), ("ema_v1", "ema_v2")], ids=str)
def test_a_state_of_another_strategy_is_refused_and_names_both(names):
    mine, theirs = (_used(mlp(), name) for name in names)
    with refused(mine, polyak.StateError, repr(names[0]), repr(names[1]), f"strategy={names[1]!r}"):
        mine.load_state_dict(theirs.state_dict())


def test_a_state_with_other_settings_loads_with_a_warning():
    averager = _used(mlp(), decay=0.9)
    with pytest.warns(polyak.PolyakWarning, match=r"decay=0.9 \(saved: 0.5\)"):
        averager.load_state_dict(_used(mlp(), decay=0.5).state_dict())
    assert averager.strategy == polyak.EMA(decay=0.9)


def test_a_setting_that_a_plugin_renamed_is_told_when_a_state_is_loaded():
    def version(setting, default):
        body = {"__annotations__": {"name": Literal["odd"], setting: float}, "name": "odd", setting: default}
        return type("Odd", (polyak.Strategy,), {**body, "__module__": __name__, "rate": lambda self, clock: 0.5})

    old, new = version("power", 0.5), version("exponent", 0.9)
    averager = _used(mlp(), new())
    with pytest.warns(polyak.PolyakWarning, match=r"no 'power' \(saved: 0.5\), exponent=0.9 \(not saved\)"):
        averager.load_state_dict(_used(mlp(), old()).state_dict())


# Rates


class Odd(polyak.Strategy):
    name: Literal["odd"] = "odd"

    def rate(self, clock):
        return 0.5


BAD_RATES = [-0.1, 1.0000001, float("nan"), float("inf"), -float("inf"), None, "0.5", 0.5j, torch.tensor(0.5), [0.5]]


@pytest.mark.parametrize("rate", BAD_RATES, ids=repr)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_rate_outside_of_its_range_is_refused(rate, kind):
    class Wrong(Odd):
        def rate(self, clock):
            return rate if clock.n > 2 else 0.5

    averager = _used(ZOO[kind].build(), Wrong())
    with refused(averager, polyak.RateError, "Wrong", repr(rate), "[0, 1]", "Nothing was averaged"):
        averager.update()


def test_a_rate_that_cannot_be_computed_leaves_everything_as_it_was():
    class Failing(Odd):
        def rate(self, clock):
            return 1.0 / (clock.n - 3)

    averager = _used(mlp(), Failing(), steps=0)
    with refused(averager, polyak.RateError, "-0.5"):
        averager.update()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0], ids=repr)
def test_a_weight_that_is_no_mass_is_refused(weight):
    class Weighing(polyak.Strategy):
        name: Literal["weighing"] = "weighing"

        def weight(self, clock):
            return weight if clock.n > 2 else 1.0

        def rate(self, clock):
            return 0.5

    averager = _used(mlp(), Weighing())
    with refused(averager, polyak.RateError, "weight"):
        averager.update()


def test_a_strategy_that_raises_leaves_everything_as_it_was():
    class Raising(Odd):
        def rate(self, clock):
            if clock.n > 2:
                raise OSError(clock)
            return 0.5

    averager = _used(mlp(), Raising())
    with refused(averager, OSError, "Clock(n=3"):
        averager.update()


# Weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["mlp", "conv", "complex", "mixed_dtypes"])
def test_nonfinite_weights_are_refused_where_asked(value, kind):
    model = ZOO[kind].build()
    averager = _used(model, nonfinite="raise")
    name, parameter = [*model.named_parameters()][-1]
    parameter.data.view(-1)[0] = value
    with refused(averager, polyak.NonFiniteError, name, "step 3", "nonfinite='skip'"):
        averager.update()
    parameter.data.view(-1)[0] = 0
    averager.update()
    assert (averager.n, averager.skipped) == (3, 0)


def test_a_plugin_with_a_wrong_offer_is_refused():
    from polyak.registry import Registry

    class Offers:
        @hookimpl
        def polyak_strategies(self):
            return [int]

    with pytest.raises(polyak.PluginError, match=r"<class 'int'>.*polyak\.Strategy"):
        Registry([], strict=False, disabled=frozenset()).register(Offers(), "mine")


# Every error of polyak's is a PolyakError, and the builtin that it is


class Nameless(polyak.Strategy):
    def rate(self, clock):
        return 0.5


def _assign(target, name):
    setattr(target, name, 1)


DIRECT = [
    (lambda: polyak.EMA(decay=2), ValueError, ["EMA() cannot be used", "decay", "less than 1", "2"]),
    (lambda: polyak.EMA(decay="0.999"), ValueError, ["decay", "valid number", "'0.999'"]),
    (lambda: polyak.EMA(0.999), TypeError, ["by name only", "0.999", "decay=..."]),
    (lambda: polyak.AveragerConfig({"every": 3}), TypeError, ["by name only", "{'every': 3}"]),
    (lambda: polyak.AveragerConfig(every=0), ValueError, ["every", "greater than 0", "0"]),
    (lambda: polyak.AveragerConfig(strategy="emma"), KeyError, ["'emma'", "Did you mean 'ema'"]),
    (lambda: polyak.BlockMean(), ValueError, ["length", "must be given"]),
    (Nameless, ValueError, ["Nameless()", "name: Literal['my_name'] = 'my_name'"]),
    (lambda: polyak.average(mlp(), Nameless), ValueError, ["Nameless()", "Literal"]),
    (polyak.Strategy, TypeError, ["abstract", "rate()"]),
    (lambda: _assign(polyak.EMA(), "decay"), AttributeError, ["EMA.decay is frozen", "EMA(decay=...)"]),
    (lambda: _assign(polyak.AveragerConfig(), "every"), AttributeError, ["AveragerConfig.every is frozen"]),
    (lambda: _assign(polyak.SWA(), "decay"), AttributeError, ["SWA has no setting 'decay'"]),
    (lambda: delattr(polyak.EMA(), "decay"), AttributeError, ["EMA.decay is frozen"]),
    (lambda: _assign(polyak.average(mlp()), "decay"), AttributeError, ["'decay' cannot be set", "configure"]),
    (
        lambda: _assign(polyak.bank(mlp(), {"a": "ema"}), "decay"),
        AttributeError,
        ["'decay' cannot be set", "configure"],
    ),
    (lambda: polyak.bank(mlp(), {"a": "ema"})["b"], KeyError, ["no average 'b'", "it has 'a'"]),
]


@pytest.mark.parametrize(("call", "builtin", "words"), DIRECT, ids=[", ".join(words[:2]) for *_, words in DIRECT])
def test_what_a_strategy_or_a_config_refuses_is_an_error_of_polyak(call, builtin, words):
    with pytest.raises(polyak.PolyakError) as caught:
        call()
    assert isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value)


def test_inside_a_model_of_the_users_own_pydantic_collects_all_errors_with_their_locations():
    class Train(BaseModel):
        lr: float = 0.1
        ema: polyak.AveragerConfig = polyak.AveragerConfig()
        short: polyak.EMA = polyak.EMA(decay=0.9)

    wrong = {"lr": "x", "ema": {"every": 0, "strategy": {"name": "ema", "decay": 3}}, "short": {"decay": True}}
    with pytest.raises(ValidationError) as caught:
        Train(**wrong)
    places = [error["loc"] for error in caught.value.errors()]
    assert places == [("lr",), ("ema", "every"), ("ema", "strategy", "decay"), ("short", "decay")]
    assert Train(ema={"strategy": "swa"}).ema.strategy == polyak.SWA()


PROFILES = [
    (lambda: polyak.Profile.of(polyak.BlockMean, 3), ValueError, ["length"]),
    (lambda: polyak.Profile.of("ema", 3), TypeError, ["'ema'", "AveragerConfig(strategy='ema').profile(step)"]),
    (lambda: polyak.Profile.of(polyak.EMA(), -3), ValueError, ["n: got -3", "from 0"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 2.5), ValueError, ["n: got 2.5", "an integer"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 10**15), ValueError, ["n: got 10000", "100,000,000"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, every=0), ValueError, ["every: got 0", "from 1"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, start=0.75), ValueError, ["start: got 0.75"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, origin="last"), ValueError, ["'last'", "'initial', 'first'"]),
    (lambda: polyak.Profile.from_rates([math.nan]), ValueError, ["finite numbers"]),
    (lambda: polyak.Profile.from_rates(["a"]), ValueError, ["finite numbers", "['a']"]),
    (lambda: polyak.Profile.from_rates([0.5, 0.5], [1]), ValueError, ["2 shares and 1 steps"]),
    (
        lambda: polyak.Profile.from_rates([0.5, 0.5], ["a", "b"]),
        ValueError,
        ["steps: got ['a', 'b']"],
    ),
    (lambda: polyak.Profile.from_rates([0.5], [1.5]), ValueError, ["steps: got [1.5]"]),
    (lambda: polyak.Profile.from_rates([0.5], [True]), ValueError, ["steps: got [True]"]),
    (lambda: polyak.Profile.from_rates([0.5], [-1]), ValueError, ["steps: got [-1]"]),
    (lambda: polyak.Profile.from_rates([0.5], [2**63]), ValueError, ["steps: got [9223372036854775808]"]),
    (
        lambda: polyak.Profile.from_rates([0.5, 0.5], [2, 2]),
        ValueError,
        ["steps: got [2, 2]", "larger than"],
    ),
    (lambda: polyak.Profile.from_rates([0.5, 0.5], 3), ValueError, ["steps: got 3"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, lr="x"), ValueError, ["lr: got 'x'"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3, lr=math.nan), ValueError, ["lr: got nan"]),
    (lambda: polyak.Profile.of(polyak.EMA(), 3).distance("swa"), TypeError, ["another profile", "'swa'"]),
    (lambda: polyak.AveragerConfig().profile("a"), TypeError, ["step: got 'a'"]),
    (lambda: polyak.AveragerConfig.of(None), TypeError, ["got None", "a mapping"]),
    (lambda: polyak.AveragerConfig.of(["ema"]), TypeError, ["got ['ema']", "a strategy, or a mapping"]),
    (lambda: polyak.AveragerConfig.from_file(None), TypeError, ["a config file is given as a path", "None"]),
    (lambda: polyak.strategies()["emma"], KeyError, ["'emma'", "Known: ema"]),
    (lambda: polyak.convert("ema", None, steps=100), TypeError, ["None as the family"]),
    (lambda: polyak.convert("ema", "power", steps="a"), TypeError, ["steps: got 'a'", "an integer"]),
    (lambda: polyak.recalibrate([], polyak.average(mlp())), TypeError, ["are the arguments swapped"]),
    (lambda: polyak.recalibrate(None, []), TypeError, ["None as the averager"]),
    (lambda: polyak.average(mlp(), "lawa", window=10**12), ValueError, ["window=1,000,000,000,000", "100,000"]),
    (lambda: polyak.average(mlp(), device=True), ValueError, ["device: got True"]),
    (lambda: polyak.average(mlp(), device=200), ValueError, ["device: got 200"]),
]


@pytest.mark.parametrize(("call", "builtin", "words"), PROFILES, ids=[words[0] for *_, words in PROFILES])
def test_what_a_function_refuses_is_an_error_of_polyak(call, builtin, words):
    with pytest.raises(polyak.PolyakError) as caught:
        call()
    assert isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value)


def test_a_profile_takes_a_class_whose_settings_have_defaults():
    assert polyak.Profile.of(polyak.SWA, 4).shares.tolist() == [0.25] * 4


# Names and habits from other libraries

HABITS = [
    ("ema", {"momentum": 0.1}, "Did you mean 'decay', the part that is kept (1 minus"),
    ("ema", {"alpha": 0.1}, "Did you mean 'decay'"),
    ("ema", {"beta": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"ema_decay": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"decay_rate": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"tau": 0.9}, "Did you mean 'decay'"),
    ("ema", {"gamma": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"half_life": 100}, "'ema_halflife'"),
    ("ema", {"power": 0.75}, "'power' (gamma=)"),
    ("ema", {"sigma_rel": 0.1}, "a setting of 'power'"),
    ("ema", {"warmup": True}, "'ema_debiased'"),
    ("ema", {"debias": True}, "'ema_debiased'"),
    ("ema_v3", {"warmup": True}, "Did you mean 'use_warmup'?"),
    ("ema_v3", {"inv_gamma": 1.0}, "Did you mean 'warmup_gamma'?"),
    ("ema_v3", {"power": 0.75}, "Did you mean 'warmup_power'?"),
    ("ema_halflife", {"halflife": 5, "half_life": 100}, "Did you mean 'halflife'?"),
    ("swa", {"decay": 0.9}, "It has no decay"),
    ("swa", {"swa_start": 10}, "Did you mean 'start'?"),
    ("swa", {"k": 10}, "'lawa' (window=)"),
    ("lawa", {"window_size": 10}, "Did you mean 'window'?"),
    ("ema", {"update_every": 10}, "Did you mean 'every'?"),
    ("ema", {"use_buffers": True}, 'Did you mean \'buffers\', "average", "copy" or "skip"?'),
    ("ema", {"avg_fn": None}, "derive from polyak.Strategy"),
    ("ema", {"multi_avg_fn": None}, "derive from polyak.Strategy"),
]


@pytest.mark.parametrize(("strategy", "settings", "hint"), HABITS, ids=[f"{s}-{[*w][-1]}" for s, w, _ in HABITS])
def test_a_setting_of_another_library_is_answered_with_its_name_here(strategy, settings, hint):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), strategy, **settings)
    assert hint in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 300


def test_a_strategy_made_directly_knows_the_same_habits_and_sends_options_to_average():
    for settings, hint in (
        ({"momentum": 0.1}, "Did you mean 'decay'"),
        ({"update_every": 10}, "Did you mean 'every'? It is an option of the averager"),
        ({"every": 10}, "'every' is an option of the averager"),
        ({"decya": 0.5}, "Did you mean 'decay'?"),
    ):
        with pytest.raises(polyak.ConfigError) as caught:
            polyak.EMA(**settings)
        assert hint in str(caught.value)


# Arguments that changed places

SWAPPED = [
    lambda model: polyak.average("ema", model),
    lambda model: polyak.average(polyak.EMA(), model),
    lambda model: polyak.average({"name": "ema"}, dict(model.state_dict())),
    lambda model: polyak.bank({"a": "ema"}, model),
]


@pytest.mark.parametrize("call", SWAPPED)
def test_swapped_arguments_are_asked_about_without_printing_a_model(call):
    with pytest.raises(polyak.ArgumentError) as caught:
        call(nn.Sequential(*[nn.Linear(3, 3) for _ in range(100)]))
    assert "are the arguments swapped?" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), [nn.Linear(2, 2)], torch.ones(10_000), {"a": mlp()}], ids=shown)
def test_what_is_no_strategy_is_named_in_short(wrong):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), wrong)
    assert len(str(caught.value)) < 300


def test_average_and_check_strategy_take_the_same_things():
    from polyak.testing import check_strategy

    for strategy, settings in (
        ("ema", {"decay": 0.5}),
        (polyak.EMA, {"decay": 0.5}),
        ({"name": "ema"}, {"decay": 0.5}),
        (polyak.EMA(decay=0.5), {}),
    ):
        assert polyak.average(mlp(), strategy, **settings).strategy == polyak.EMA(decay=0.5)
        check_strategy(strategy, **settings)
    for wrong in (None, 3, ["ema"], nn.Linear):
        for call in (check_strategy, lambda value: polyak.average(mlp(), value)):
            with pytest.raises(polyak.ArgumentError, match="a strategy is a name"):
                call(wrong)


# Config files that are hostile, or written by habit: one answer in words, in bounded time


def _laughs(join):
    lines = ["a: &a {x: 1}"]
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True):
        lines.append(f"{new}: &{new} {join(', '.join([f'*{old}'] * 9))}")
    return "\n".join(lines)


HOSTILE = {
    "laughs.yaml": (_laughs("[{}]".format), "20,000 values"),
    "merges.yaml": (_laughs("{{<<: [{}]}}".format), "20,000 values"),
    "itself.yaml": ("strategy: &a [*a]", "an alias of what it stands in"),
    "deep.yaml": ("every: " + "[" * 10_000, "within one another"),
    "keys.yaml": ("? " * 10_000, "within one another"),
    "deep.json": ('{"every": ' * 20_000, "within one another"),
    "deep.toml": ("every = " + "[" * 40_000, "within one another"),
    "dotted.toml": (".".join(["a"] * 40_000) + " = 1", "too many parts (at line 1)"),
    "quoted.toml": ("x = 1\n[" + ".".join(['"a"'] * 40_000) + "]", "too many parts (at line 2)"),
    "digits.json": ('{"every": ' + "9" * 10_000 + "}", "digits"),
    "digits.yaml": ("every: " + "9" * 10_000, "digits"),
    "hexadecimal.toml": ("every = 0x" + "f" * 10_000, "<an integer of 40000 bits>"),
    "large.json": (" " * 300_000, "300,000 bytes; expected a config of at most 256 KiB"),
    "name.json": (json.dumps({"strategy": "x" * 200_000}), "no strategy is called 'xxx"),
    "key.toml": ("x" * 200_000 + " = 1", "there is no such setting"),
    "value.yaml": ("every: " + "x" * 100_000, "valid integer"),
    "many.json": (json.dumps({"buffers": {str(i): "no" for i in range(9000)}}), "more lines"),
    "tag.yaml": ("every: !<" + "a" * 100_000 + "> 3", "not valid YAML"),
    "object.yaml": ("every: !!python/object/apply:os.getpid []", "not valid YAML"),
    "set.yaml": ("include: !!set {a, b}", "not valid YAML"),
    "twice.yaml": ("every: 3\nstrategy: {name: ema, 'name': swa}", "the key 'name' is given twice"),
    "twice.json": ('{"every": 3, "start": 1, "every": 5}', "the key 'every' is given twice"),
    "twice.toml": ("every = 3\nevery = 5", "not valid TOML"),
    "number.yaml": ("1: 2", "Keys should be strings"),
    "schema.json": ('{"$schema": 3}', "$schema 3; expected a text"),
    "two.yaml": ("every: 3\n---\nevery: 5", "not valid YAML"),
}


def _briefly(message):
    return len(message.splitlines()) <= 10 and max(map(len, message.splitlines())) < 700


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_file_is_refused_in_ten_lines(name, tmp_path):
    text, words = HOSTILE[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.AveragerConfig.from_file(tmp_path / name)
    assert words in str(caught.value)
    assert _briefly(str(caught.value))


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "null"])
def test_what_is_no_regular_file_is_not_opened(kind, tmp_path):
    path = tmp_path / "average.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path = tmp_path / "a\0.toml"
    with pytest.raises(polyak.ConfigError, match="cannot be read: "):
        polyak.AveragerConfig.from_file(path)


def test_names_of_megabytes_are_not_printed():
    long = "x" * 2_000_000
    for call in (
        lambda: polyak.average(mlp(), long),
        lambda: polyak.average(mlp(), f"{long}:ema"),
        lambda: polyak.average(mlp(), {"name": "ema", long: 1}),
        lambda: polyak.average(mlp(), origin=long),
        lambda: polyak.average(mlp(), dtype=long),
        lambda: polyak.average(mlp(), device=long),
        lambda: polyak.average(mlp(), buffers={"*": long}),
        lambda: polyak.average(mlp(), include=long),
        lambda: polyak.bank(mlp(), {long: "emma"}),
        lambda: polyak.AveragerConfig.from_file(f"{long}.toml"),
        lambda: polyak.AveragerConfig.from_file(f"a.{long}"),
    ):
        with pytest.raises(polyak.ConfigError) as caught:
            call()
        assert _briefly(str(caught.value)), str(caught.value)[:200]


HABITUAL = [
    ("a.yaml", "strategy: {name: ema, decay: 1e-1}", ("strategy.decay", 0.1)),
    ("a.yaml", "start: 1e3", ("start", 1000)),
    ("a.toml", "start = 1e3", ("start", 1000)),
    ("a.json", '{"start": 1e3}', ("start", 1000)),
    ("a.yaml", "start: 010", ("start", 10)),
    ("a.yaml", "start: 0x10", ("start", 16)),
    ("a.toml", "\ufeffstart = 3", ("start", 3)),
    ("a.json", '\ufeff{"start": 3}', ("start", 3)),
    ("a.yaml", "\ufeffstart: 3", ("start", 3)),
    ("a.yaml", "strategy: &s {name: ema, decay: 0.5}", ("strategy.decay", 0.5)),
    ("a.yaml", "include: &i [0.*]\nexclude: *i", ("exclude", ("0.*",))),
    ("a.yaml", "buffers: {<<: {a: copy}, b: skip}", ("buffers", {"a": "copy", "b": "skip"})),
    ("a.yaml", "start: 1:30", None),
    ("a.yaml", "start: 1_000", None),
    ("a.yaml", "every: yes", None),
    ("a.yaml", "every: '3'", None),
    ("a.yaml", "strategy:\nevery: 3", None),
    ("a.json", '{"every": true}', None),
    ("a.json", '{"strategy": {"name": "ema", "decay": "0.999"}}', None),
    ("a.json", '{"strategy": {"name": "ema", "decay": false}}', None),
    ("a.json", '{"strategy": {"name": "ema_v3", "use_warmup": 1}}', None),
    ("a.json", '{"strategy": {"name": "ema", "decay": NaN}}', None),
    ("a.toml", 'strategy = {name = "ema", decay = inf}', None),
    ("a.toml", 'strategy = {name = "ema_v3", warmup_gamma = inf}', None),
]


@pytest.mark.parametrize(("name", "text", "wanted"), HABITUAL, ids=[text.strip("\ufeff") for _, text, _ in HABITUAL])
def test_what_people_write_by_habit_is_read_as_an_editor_reads_it_or_refused(name, text, wanted, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    if wanted is None:
        with pytest.raises(polyak.ConfigError, match="cannot be used"):
            polyak.AveragerConfig.from_file(tmp_path / name)
    else:
        config = polyak.AveragerConfig.from_file(tmp_path / name)
        assert attrgetter(wanted[0])(config) == wanted[1]


# Attributes that averages of other libraries have

ATTRIBUTES = {
    "step": "averager.update()",
    "update_parameters": "averager.update()",
    "store": "averager.applied()",
    "restore": "averager.applied()",
    "apply_shadow": "averager.applied()",
    "copy_to_": "averager.copy_to()",
    "ema": "averager.module",
    "shadow_params": "averager.averages",
    "ema_state_dict": "averager.averaged_state_dict()",
    "n_averaged": "averager.n",
    "decay": "averager.strategy",
    "save": "polyak.save(averager, path)",
    "to": "polyak.average(model, ..., device=, dtype=)",
    "update_bn": "polyak.recalibrate(averager, batches)",
    "updat": "Did you mean 'update'?",
    "unheard_of": "has no attribute 'unheard_of'.",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_of_another_library_is_answered_with_what_serves_here(name):
    averager = polyak.average(mlp())
    with pytest.raises(polyak.AttributeAccessError, match=re.escape(ATTRIBUTES[name])) as caught:
        getattr(averager, name)
    assert isinstance(caught.value, AttributeError)
    assert not hasattr(averager, name)


def test_a_bank_sends_to_its_averages_what_only_they_have():
    bank = polyak.bank(mlp(), {"a": "ema"})
    for name, answer in (("copy_to", "bank['name'].copy_to"), ("n", "bank['name'].n"), ("step", "bank.update()")):
        with pytest.raises(polyak.AttributeAccessError, match=re.escape(answer)):
            getattr(bank, name)


def test_a_property_that_fails_says_why_and_is_not_called_missing():
    class Failing(nn.Linear):
        def __deepcopy__(self, memo):
            message = "of the model's own"
            raise AttributeError(message)

    averager = polyak.average(Failing(2, 2))
    with pytest.raises((AttributeError, polyak.ModelError)) as caught:
        averager.module.no_such_thing  # noqa: B018 - reading it is the test
    assert "has no attribute 'module'" not in str(caught.value)


CALLS = [
    lambda averager: averager.update(weights=None),
    lambda averager: averager.applied(1, 2, 3),
    lambda averager: averager.copy_to(1, 2, 3),
    lambda averager: averager.load_state_dict(),
    lambda averager: averager.configure(0.5),
    lambda averager: averager.no_such_thing,
    lambda averager: setattr(averager, "no_such_thing", 1),
    lambda averager: polyak.attach(averager, torch.optim.SGD([torch.zeros(1)], lr=0.1)),
    lambda averager: polyak.save("average.pt", averager),
    lambda averager: polyak.load("average.pt", averager),
    lambda averager: polyak.save(mlp(), "average.pt"),
    lambda averager: polyak.distributed.save("average", averager),
    lambda averager: polyak.distributed.load("average", averager),
    lambda averager: polyak.average(averager),
    lambda averager: polyak.average(mlp(), averager),
]


@pytest.mark.parametrize("call", CALLS)
def test_messages_speak_of_averagers(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as caught:
        call(polyak.average(mlp()))
    assert "Engine" not in str(caught.value)
    assert re.search("[Aa]verager", str(caught.value))
    assert list(tmp_path.iterdir()) == []


SWAPPED_AVERAGERS = [
    lambda averager, optimizer: polyak.attach(averager, optimizer),
    lambda averager, optimizer: polyak.save("average.pt", averager),
    lambda averager, optimizer: polyak.load("average.pt", averager),
    lambda averager, optimizer: polyak.distributed.save("average", averager),
    lambda averager, optimizer: polyak.distributed.load("average", averager),
    lambda averager, optimizer: polyak.save("average.pt", polyak.bank(mlp(), {"a": "ema"})),
]


@pytest.mark.parametrize("call", SWAPPED_AVERAGERS)
def test_an_averager_in_the_second_place_is_asked_about(call):
    model = mlp()
    with pytest.raises(polyak.ArgumentError, match="are the arguments swapped"):
        call(polyak.average(model), torch.optim.SGD(model.parameters(), lr=0.1))


# Calls in another order, with other arguments, or of names that other libraries have


def _averager():
    return polyak.average(mlp(), "ema", decay=0.9)


def _bank():
    return polyak.bank(mlp(), {"short": "ema", "mean": "swa"})


def _entered(context):
    with context:
        pass


def _loss(state):
    return state["0.weight"].sum()


MISTAKEN_CALLS = {
    "decay by position": (
        lambda: polyak.average(mlp(), "ema", 0.9),
        ["by name", "polyak.average(model, "],
    ),
    "no model": (lambda: polyak.average(strategy="ema"), ["missing", "'model'", "polyak.average(model"]),
    "a bank of nothing": (lambda: polyak.bank(mlp()), ["missing", "polyak.bank(model, {"]),
    "configure by position": (lambda: _averager().configure(0.5), ["averager.configure(decay=0.5)"]),
    "update with a decay": (lambda: _averager().update(decay=0.5), ["got decay=0.5", "averager.configure("]),
    "update with a step": (lambda: _averager().update(None, 7), ["step=", "got 7"]),
    "load with strict": (lambda: _averager().load_state_dict({}, strict=False), ["'strict'", "whole or not at all"]),
    "applied of a bank": (lambda: _bank().applied(), ["bank.applied('mean')"]),
    "the protocol": (lambda: polyak.Averager(mlp()), ["polyak.average(model, 'ema'"]),
    "with averager": (lambda: _entered(_averager()), ["averager is no context", "with averager.applied()"]),
    "with bank": (lambda: _entered(_bank()), ["bank is no context", "with bank.applied('name')"]),
    "load without a path": (lambda: polyak.load(_averager(), None), ["load()", "a path", "None"]),
    "save to an open file": (lambda: polyak.save(_averager(), io.StringIO()), ["save()", "a path", "StringIO"]),
    "recorder swapped": (
        lambda: polyak.posthoc.Recorder("snaps", _bank(), every=2),
        ["swapped", "polyak.posthoc.Recorder(bank, directory, every=...)"],
    ),
    "recorder without a folder": (lambda: polyak.posthoc.Recorder(_bank(), 5, every=2), ["a path", "5"]),
    "sweep swapped": (lambda: polyak.posthoc.sweep(_loss, "snaps"), ["polyak.posthoc.sweep(directory, evaluate)"]),
    "AdamW swapped": (
        lambda: polyak.optim.AdamW(_averager(), mlp().parameters()),
        ["the averager first", "polyak.optim.AdamW(model.parameters(), averager=averager)"],
    ),
    "recalibrate with a tensor": (
        lambda: polyak.recalibrate(polyak.average(Conv()), torch.ones(4, 3)),
        ["iterable of batches", "<Tensor>", "[x]", "x.split(64)"],
    ),
    "recalibrate with a mapping": (lambda: polyak.recalibrate(Conv(), {"x": torch.ones(1)}), ["iterable", "[x]"]),
    "recalibrate with a number": (lambda: polyak.recalibrate(Conv(), 5), ["iterable of batches", "got 5"]),
    "rate without a clock": (
        lambda: type("Half", (polyak.Strategy,), {"rate": lambda self: 0.5}),
        ["Half.rate(self)", "rate(self, clock)"],
    ),
}


@pytest.mark.parametrize("case", MISTAKEN_CALLS)
def test_a_call_that_cannot_be_meant_shows_the_right_one(case):
    call, words = MISTAKEN_CALLS[case]
    with pytest.raises(polyak.ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "Engine" not in str(caught.value)


def test_a_type_error_of_a_called_function_stays_its_own():
    averager = polyak.average(mlp(), "ema", decay=0.9)
    averager.updater.listeners.append(lambda: None)
    with pytest.raises(TypeError, match="positional") as caught:
        averager.update()
    assert not isinstance(caught.value, polyak.PolyakError)


PACKAGE_NAMES = {
    "ModelEmaV3": "polyak.average(model, 'ema_v3'",
    "AveragedModel": "polyak.average(model, 'ema'",
    "ema": "polyak.average(model, 'ema'",
    "Recorder": "polyak.posthoc.Recorder",
    "update_bn": "polyak.recalibrate(averager, batches)",
    "AdamW": "polyak.optim.AdamW",
}


@pytest.mark.parametrize("name", PACKAGE_NAMES)
def test_names_of_other_libraries_in_the_package_name_ours(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*{re.escape(PACKAGE_NAMES[name])}"):
        getattr(polyak, name)
    assert not hasattr(polyak, "no_such_name")


def test_attributes_that_only_the_type_has_are_none_of_the_averagers():
    with pytest.raises(AttributeError, match=r"averager has no attribute 'register'.*polyak\.attach"):
        _averager().register  # noqa: B018 - the access is what is tested


# Files that are something else


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_state_say_what_they_are_and_what_to_do(tmp_path, suffix):
    averager, file = _averager(), tmp_path / f"average{suffix}"
    polyak.save(averager, file)
    file.write_bytes(file.read_bytes()[:60])
    with refused(averager, polyak.StateError, str(file), "damaged", "earlier file"):
        polyak.load(averager, file)


def test_a_pickled_model_is_refused_in_one_line(tmp_path):
    averager, file = _averager(), tmp_path / "model.pt"
    torch.save(mlp(), file)
    with pytest.raises(polyak.StateError, match="holds a whole pickled object") as caught:
        polyak.load(averager, file)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: polyak.load(_averager(), folder / "none.pt"),
        lambda folder: polyak.load(_averager(), folder / "none.safetensors"),
        lambda folder: polyak.AveragerConfig.from_file(folder / "none.toml"),
        lambda folder: polyak.posthoc.synthesize(folder / "none", "swa"),
    ],
    ids=["state", "safetensors", "config", "snapshots"],
)
def test_a_missing_file_is_a_file_not_found_error(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="none") as caught:
        read(tmp_path)
    assert isinstance(caught.value, polyak.MissingFileError)
    assert isinstance(caught.value, polyak.StateError)
    assert isinstance(caught.value, polyak.ConfigError)


# Messages that lead to what was meant


MEANT = {
    "an option inside a mapping": (
        lambda: polyak.AveragerConfig(strategy={"name": "ema", "every": 10}),
        ["strategy.every", "'every' is an option of the averager: move it out of 'strategy'"],
    ),
    "a strategy of a model": (lambda: polyak.EMA(mlp(), decay=0.9), ["polyak.average(model, polyak.EMA(...))"]),
    "no settings": (lambda: polyak.SWA(5), ["got 5", "It has no settings: SWA()"]),
    "a config by position": (lambda: polyak.AveragerConfig("ema"), ["Write strategy=..."]),
    "a config of a model": (lambda: polyak.AveragerConfig(mlp()), ["config.build(model)"]),
    "parameters()": (lambda: polyak.average(mlp().parameters()), ["generator", "not model.parameters()"]),
    "a list of parameters": (lambda: polyak.average([*mlp().parameters()]), ["list", "not model.parameters()"]),
    "a class of modules": (lambda: polyak.average(nn.Linear), ["got the class Linear"]),
    "a whole checkpoint": (
        lambda: _averager().load_state_dict({"averager": _averager().state_dict(), "model": mlp().state_dict()}),
        ["Pass checkpoint['averager']"],
    ),
    "a whole checkpoint for a bank": (
        lambda: _bank().load_state_dict({"averages": _bank().state_dict()}),
        ["Pass checkpoint['averages']"],
    ),
    "a path as a state": (lambda: _averager().load_state_dict("average.pt"), ["polyak.load(averager, path)"]),
    "weights as a state": (lambda: _averager().load_state_dict(mlp().state_dict()), ["model.load_state_dict()"]),
    "buffers as a flag": (lambda: polyak.average(mlp(), buffers=True), ["got True", "'average', 'copy', 'skip'"]),
    "a function as globs": (lambda: polyak.average(mlp(), include=len), ["include", "a name or a glob", "no function"]),
    "a new strategy": (lambda: setattr(_averager(), "strategy", polyak.SWA()), ["build a new one"]),
    "a new count": (lambda: setattr(_averager(), "n", 5), ["'n' cannot be set; it can only be read"]),
    "a setting of the strategy": (lambda: _averager().decay, ["averager.strategy.decay"]),
    "an average of a bank": (lambda: _bank().short, ["bank['short']"]),
    "a config file": (lambda: polyak.average(mlp(), "average.toml"), ["the config file 'average.toml' cannot be read"]),
    "an optimiser": (lambda: polyak.average(mlp(), "lookahead"), ["which no strategy does"]),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_message_leads_to_what_was_meant(case):
    call, words = MEANT[case]
    with pytest.raises(polyak.PolyakError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).count("buffers:") < 2


OTHER_NAMES = {
    "exponential": "ema",
    "exponential_moving_average": "ema",
    "model_ema": "ema",
    "mean": "swa",
    "polyak": "swa",
    "karras": "power",
    "ModelEmaV3": "ema_v3",
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_strategys_name_elsewhere_names_ours(name):
    with pytest.raises(polyak.UnknownStrategyError, match=f"Did you mean '{OTHER_NAMES[name]}'"):
        polyak.average(mlp(), name)


def test_a_file_in_a_folder_that_is_not_there_asks_for_the_folder(tmp_path):
    file = tmp_path / "none" / "average"
    for write in (
        lambda: polyak.save(_averager(), file.with_suffix(".pt")),
        lambda: polyak.save(_averager(), file.with_suffix(".safetensors")),
        lambda: polyak.AveragerConfig().to_file(file.with_suffix(".toml")),
    ):
        with pytest.raises(polyak.WriteError, match=r"there is no folder '.*none'; make it first") as caught:
            write()
        assert ".polyak-" not in str(caught.value)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "Make room"), (errno.EPERM, "Give another path")])
def test_room_is_asked_for_only_on_a_full_disk(tmp_path, monkeypatch, number, advice):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "scratch")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(polyak.WriteError, match=rf"{os.strerror(number)}\. {advice}"):
        polyak.save(_averager(), tmp_path / "a.pt")


@pytest.mark.parametrize("read", ["load", "load_state_dict"])
def test_other_settings_than_the_saved_ones_are_warned_of_at_the_users_line(tmp_path, read):
    saved, other = _averager(), polyak.average(mlp(), "ema", decay=0.5)
    polyak.save(saved, tmp_path / "a.pt")
    with pytest.warns(polyak.PolyakWarning, match=r"settings differ from the saved ones .*: decay=0\.5") as caught:
        polyak.load(other, tmp_path / "a.pt") if read == "load" else other.load_state_dict(saved.state_dict())
    assert [warning.filename for warning in caught] == [__file__]


def test_every_wrong_part_is_said_at_once_also_beside_an_unknown_strategy():
    with pytest.raises(polyak.UnknownStrategyError, match=r"(?s)dtype: got 'int8'.*strategy: .*'emaa'"):
        polyak.average(mlp(), "emaa", dtype="int8")
    with pytest.raises(polyak.ConfigError, match=r"(?s)the average 'a' .*'emaa'.*the average 'b' .*decay"):
        polyak.bank(mlp(), {"a": "emaa", "b": {"name": "ema", "decay": 2}})


def test_a_step_that_restarts_each_epoch_is_named_first():
    averager = _averager()
    averager.update(step=5)
    with pytest.warns(polyak.PolyakWarning, match="count over the whole run, not per epoch"):
        averager.update(step=1)


def test_copy_to_another_model_speaks_of_no_update():
    with pytest.raises(polyak.MismatchError, match=r"Give the model the averager was built from"):
        _averager().copy_to(nn.Linear(3, 3))


@pytest.mark.parametrize("settings", [{"decay": "0.999"}, {"every": "3"}, {"decay": "1e-3"}], ids=str)
def test_a_number_in_quotes_is_asked_for_without_them(settings):
    with pytest.raises(polyak.ConfigError, match=r"\(got '.*'\)\. Write it without quotes\."):
        polyak.average(mlp(), "ema", **settings)
