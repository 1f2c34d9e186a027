"""An averager as a user builds, updates and reads it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import polyak
from evaluations import used
from models import ZOO, Buffers, Conv, Tied, average_bits, drifting, mlp, model_bits

# Building


@pytest.mark.parametrize(
    "build",
    [
        lambda m: polyak.average(m, "ema", decay=0.9, every=3),
        lambda m: polyak.average(m, polyak.EMA(decay=0.9), every=3),
        lambda m: polyak.average(m, {"name": "ema", "decay": 0.9}, every=3),
        lambda m: polyak.average(m, strategy={"name": "ema", "decay": 0.9}, every=3),
        lambda m: polyak.AveragerConfig(strategy={"name": "ema", "decay": 0.9}, every=3).build(m),
        lambda m: polyak.AveragerConfig(strategy=polyak.EMA(decay=0.9), every=3).build(m),
    ],
    ids=["name", "object", "mapping", "config dict", "config", "config of object"],
)
def test_all_ways_to_build_build_the_same(build):
    averager = build(mlp())
    assert isinstance(averager, polyak.Averager)
    assert averager.strategy == polyak.EMA(decay=0.9)
    assert averager.options.every == 3
    assert (averager.n, averager.rate, averager.skipped, averager.is_applied) == (0, None, 0, False)


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_a_config_file_builds_what_was_written(tmp_path, suffix):
    config = polyak.AveragerConfig(strategy={"name": "ema_v3", "use_warmup": True}, every=4, exclude="*.bias")
    config.to_file(tmp_path / f"average.{suffix}")
    read = polyak.AveragerConfig.from_file(tmp_path / f"average.{suffix}")
    assert read == config
    assert list(read.build(mlp()).averages) == ["0.weight", "2.weight"]


def test_every_installed_strategy_builds_by_its_name():
    needed = {"ema_halflife": {"halflife": 100}, "block_mean": {"length": 10}}
    for name, cls in polyak.strategies().items():
        averager = polyak.average(mlp(), name, **needed.get(name, {}))
        assert type(averager.strategy) is cls
        assert averager.strategy.name == name


def test_the_strategy_s_own_choices_give_way_to_the_users():
    assert polyak.average(mlp(), "swa").options.origin == "first"
    assert polyak.average(mlp(), "swa", origin="initial").options.origin == "initial"
    assert polyak.average(mlp(), "ema_v2").options.match == "order"
    assert polyak.average(mlp(), "ema_v2", match="name").options.match == "name"
    assert polyak.average(mlp(), "ema_v3", foreach=False).options.kernel == "loop"
    assert polyak.average(mlp(), "ema_v3", foreach=False, kernel="foreach").options.kernel == "foreach"
    assert polyak.average(mlp(), "ema_v3", exclude_buffers=True).options.buffers == "copy"
    assert polyak.average(mlp(), "ema").options.origin == "initial"
    assert polyak.average(mlp(), "ema", start=5).options.origin == "first"
    assert polyak.average(mlp(), "ema", start=5, origin="initial").options.origin == "initial"


def test_the_protocol_is_what_the_engine_offers():
    averager = polyak.average(mlp())
    for name, member in vars(polyak.Averager).items():
        if not name.startswith("_") or name == "__call__":
            assert hasattr(type(averager), name), name
            assert inspect.getdoc(member), name


# Updating


def test_update_takes_the_bound_model_or_a_given_one():
    model, other = mlp(), mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    start = averager.averages["0.weight"].clone()
    averager.update(other)
    assert torch.allclose(averager.averages["0.weight"], (start + other[0].weight) / 2)
    averager.update()
    assert averager.n == 2
    assert averager.rate == 0.5


def test_update_returns_nothing_and_leaves_the_model_alone():
    model = Conv()
    averager = polyak.average(model)
    before = model_bits(model), {name: t._version for name, t in model.state_dict(keep_vars=True).items()}
    assert averager.update() is None
    assert (model_bits(model), {n: t._version for n, t in model.state_dict(keep_vars=True).items()}) == before


def test_every_averages_calls_two_four_six():
    averager = polyak.average(mlp(), "ema", decay=0.9, every=2)
    seen = []
    for _ in range(7):
        averager.update()
        seen.append(averager.n)
    assert seen == [0, 1, 1, 2, 2, 3, 3]
    assert averager.rate == pytest.approx(1 - 0.9**2)


def test_start_delays_the_average_and_the_first_update_replaces_it():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9, start=3)
    for number in drifting(model, 4):
        averager.update()
        if number <= 3:
            assert averager.n == (number == 3)
            assert torch.equal(averager.averaged_state_dict()["0.weight"], model[0].weight)
    assert averager.n == 2


def test_an_evaluation_before_the_start_computes_with_the_weights_as_they_are():
    model = mlp()
    averager = polyak.average(model, "swa", start=5)
    x = torch.ones(1, 3)
    for _ in drifting(model, 3):
        averager.update()
        assert torch.equal(averager(x), model(x))
        with averager.applied():
            inside = model(x)
        assert torch.equal(inside, model(x))


def test_the_first_update_takes_what_an_early_evaluation_saw_no_more():
    model = mlp()
    averager = polyak.average(model, "swa")
    for _ in drifting(model, 1):
        pass
    averager(torch.ones(1, 3))
    for _ in drifting(model, 1, seed=1):
        averager.update()
    assert torch.equal(averager.averages["0.weight"], model[0].weight)
    assert averager.profile().shares.tolist() == [1.0]


def test_the_same_step_twice_is_left_out_and_said_once():
    averager = polyak.average(mlp())
    averager.update(step=3)
    with pytest.warns(polyak.PolyakWarning, match="twice at step 3"):
        averager.update(step=3)
    averager.update(step=3)
    assert averager.n == 1


def test_a_step_that_goes_back_counts_anew_and_never_backwards():
    averager = polyak.average(mlp(), "ema", decay=0.9, every=3)
    for step in range(1, 10):
        averager.update(step=step)
    with pytest.warns(polyak.PolyakWarning, match=r"update\(step=4\) after step 9"):
        averager.update(step=4)
    averager.update(step=6)
    assert averager.n == 4
    assert averager.rate == pytest.approx(1 - 0.9**3)
    assert (np.diff(averager.profile().steps) > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_step_is_skipped_whole_counted_and_said_once(value):
    model = Conv()
    averager = used(model, nonfinite="skip")
    before = average_bits(averager)
    model.head.bias.data[0] = value
    with pytest.warns(polyak.PolyakWarning, match=r"step 3 \(in head\.bias\)"):
        averager.update()
    averager.update()
    assert (averager.skipped, averager.n) == (2, 2)
    assert average_bits(averager) == before
    model.head.bias.data[0] = 0.0
    averager.update()
    assert averager.n == 3
    assert averager.rate == pytest.approx(1 - 0.999**3)


def test_propagate_averages_a_broken_step():
    model = mlp()
    averager = polyak.average(model, nonfinite="propagate")
    model[0].bias.data[0] = torch.nan
    averager.update()
    assert averager.n == 1
    assert averager.averages["0.bias"].isnan().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_an_update_under_any_grad_mode_is_the_same(mode):
    torch.manual_seed(0)
    averager, reference = polyak.average(Conv(), decay=0.5), None
    torch.manual_seed(0)
    reference = polyak.average(Conv(), decay=0.5)
    with mode():
        for _ in drifting(averager.core.binding.model, 2):
            averager.update()
    for _ in drifting(reference.core.binding.model, 2):
        reference.update()
    assert average_bits(averager) == average_bits(reference)
    averager.update()
    assert not any(tensor.is_inference() for tensor in averager.averages.values())


def test_an_averager_built_under_inference_mode_works_outside():
    model = mlp()
    with torch.inference_mode():
        averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 1):
        averager.update()
    assert averager.n == 1


def test_an_update_under_autocast_is_the_same():
    model = mlp()
    pair = [polyak.average(model, "ema", decay=0.5, dtype=dtype) for dtype in ("auto", "auto")]
    for _ in drifting(model, 2):
        pair[0].update()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pair[1].update()
    assert average_bits(pair[0]) == average_bits(pair[1])


# Reading


def test_averages_is_a_read_only_view_of_the_stored_tensors():
    model = mlp()
    averager = used(model)
    averages = averager.averages
    with pytest.raises(TypeError):
        averages["0.weight"] = torch.ones(1)
    assert list(averages) == list(model.state_dict())
    before = averages["0.weight"].data_ptr()
    for _ in drifting(model, 1):
        averager.update()
    assert averager.averages["0.weight"].data_ptr() == before
    assert not any(tensor.requires_grad for tensor in averages.values())


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_an_average_shares_no_memory_with_the_model(kind):
    model = kind.build()
    averager = polyak.average(model, buffers="copy")
    live = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    for _ in range(2):
        stored = {t.untyped_storage().data_ptr() for t in averager.averages.values() if t.numel()}
        assert not live & stored
        averager.update()


def test_the_profile_names_the_steps_shares_and_what_is_left_on_the_start():
    averager = used(mlp(), "ema", steps=6, decay=0.5, every=2)
    profile = averager.profile()
    assert profile.steps.tolist() == [2, 4, 6]
    np.testing.assert_allclose(profile.shares, [0.75 / 16, 0.75 / 4, 0.75])
    assert profile.start == 0.25**3
    assert profile.half_life == 2.0
    assert profile.shares.dtype == np.float64


def test_the_profile_of_a_delayed_average_names_the_steps_it_was_made_at():
    averager = used(mlp(), "swa", steps=20, start=10, every=5)
    assert averager.profile().steps.tolist() == [10, 15, 20]


def test_describe_says_what_is_done_with_every_tensor():
    averager = used(Buffers(), "ema", decay=0.9, every=2, dtype="float64")
    text = averager.describe()
    assert "EMA(name='ema', decay=0.9)" in text
    for name in averager.averages:
        (row,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert ("copy" in row) == (name in {"count", "flags", "mask"})
    assert "float64 on cpu" in text
    assert "72 B" in text  # linear.weight: nine numbers of eight bytes
    assert "(= head.weight)" in polyak.average(Tied()).describe()


def test_repr_is_short():
    assert repr(used(mlp())) == "<averager EMA(name='ema', decay=0.999), n=2, 4 tensors>"
