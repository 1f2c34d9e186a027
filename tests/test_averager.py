"""Every method of an averager, used as a user would."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from models import ZOO, Buffers, Conv, Recurrent, Tied, average_bits, bits, drifting, mlp, model_bits


def _used(model, strategy="ema", steps=2, **options):
    averager = polyak.average(model, strategy, **options)
    for _ in drifting(model, steps):
        averager.update()
    return averager


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
    averager = _used(model, nonfinite="skip")
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
    averager = _used(model)
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
    averager = _used(mlp(), "ema", steps=6, decay=0.5, every=2)
    profile = averager.profile()
    assert profile.steps.tolist() == [2, 4, 6]
    np.testing.assert_allclose(profile.shares, [0.75 / 16, 0.75 / 4, 0.75])
    assert profile.start == 0.25**3
    assert profile.half_life == 2.0
    assert profile.shares.dtype == np.float64


def test_the_profile_of_a_delayed_average_names_the_steps_it_was_made_at():
    averager = _used(mlp(), "swa", steps=20, start=10, every=5)
    assert averager.profile().steps.tolist() == [10, 15, 20]


def test_describe_says_what_is_done_with_every_tensor():
    averager = _used(Buffers(), "ema", decay=0.9, every=2, dtype="float64")
    text = averager.describe()
    assert "EMA(name='ema', decay=0.9)" in text
    for name in averager.averages:
        (row,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert ("copy" in row) == (name in {"count", "flags", "mask"})
    assert "float64 on cpu" in text
    assert "72 B" in text  # linear.weight: nine numbers of eight bytes
    assert "(= head.weight)" in polyak.average(Tied()).describe()


def test_repr_is_short():
    assert repr(_used(mlp())) == "<averager EMA(name='ema', decay=0.999), n=2, 4 tensors>"


# The module


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_the_module_is_in_eval_mode_and_kept_in_step(kind):
    model = kind.build()
    averager = polyak.average(model, "ema", decay=0.5)
    module, x = averager.module, kind.example()
    assert not any(part.training for part in module.modules())
    assert type(module) is type(model)
    for _ in drifting(model, 3):
        averager.update()
        assert averager.module is module
        model.eval()
        with torch.no_grad():
            result = module(x)
            if kind.name != "shapes":  # whose overlapping parameters cannot hold two averages at once
                with averager.applied():
                    assert torch.equal(model(x), result)
        model.train()


def test_the_module_costs_no_memory_where_the_average_is_stored_alike():
    averager = _used(mlp())
    for name, parameter in averager.module.named_parameters():
        assert parameter.data_ptr() == averager.averages[name].data_ptr()


def test_the_module_has_the_models_dtype_and_follows_a_wider_average():
    model = mlp().bfloat16()
    averager = _used(model, decay=0.5)
    module = averager.module
    for _ in drifting(model, 2):
        averager.update()
    averager(torch.ones(1, 3, dtype=torch.bfloat16))
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, averager.averages[name].bfloat16())


def test_the_module_stays_in_step_after_a_load():
    model = mlp()
    averager = _used(model, decay=0.5)
    module, state, x = averager.module, averager.state_dict(), torch.ones(1, 3)
    expected = module(x).clone()
    for _ in drifting(model, 2):
        averager.update()
    assert not torch.equal(module(x), expected)
    averager.load_state_dict(state)
    assert torch.equal(module(x), expected)
    assert averager.module is module
    for _ in drifting(model, 1, seed=5):
        averager.update()
    assert torch.equal(module(x), averager(x))
    assert not torch.equal(module(x), expected)


def test_the_module_is_no_part_of_the_model_s_training():
    model = Conv()
    averager = _used(model)
    before = model_bits(model)
    averager(torch.randn(2, 3, 8, 8))
    averager.module(torch.randn(2, 3, 8, 8))
    assert model_bits(model) == before
    assert model.training
    assert averager(torch.randn(2, 3, 8, 8)).grad_fn is None


def test_a_call_passes_all_arguments_on():
    class Two(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    averager = polyak.average(Two(2, 2))
    x = torch.ones(1, 2)
    assert torch.equal(averager(x, scale=2.0), 2 * averager(x=x, scale=1.0))


def test_the_module_follows_a_part_of_the_model_that_was_replaced():
    model = mlp()
    averager = _used(model)
    x = torch.ones(2, 3)
    averager(x)
    model[1] = nn.Sigmoid()
    model.eval()
    with averager.applied(), torch.no_grad():
        expected = model(x)
    assert torch.equal(averager(x), expected)


def test_the_module_shares_the_parameters_of_the_model_that_are_not_averaged():
    model = mlp()
    averager = _used(model, exclude="2.*")
    assert torch.equal(averager.module[2].weight, model[2].weight)
    assert averager.module[2].weight.data_ptr() == model[2].weight.data_ptr()
    model[2].weight = nn.Parameter(torch.zeros(2, 5))
    model[2].bias = nn.Parameter(torch.ones(2))
    assert averager(torch.ones(1, 3)).tolist() == [[1.0, 1.0]]


def test_a_compiled_module_is_compiled_once_and_in_step_with_updates_and_loads():
    torch.compiler.reset()  # torch compiles a function anew only so many times, and other tests count
    model, graphs, x = mlp(), [], torch.ones(1, 3)
    averager = _used(model, decay=0.5)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(averager.module, backend=backend)
    start, state = compiled(x).clone(), averager.state_dict()
    for _ in drifting(model, 3):
        averager.update()
        assert torch.equal(compiled(x), averager(x))
    averager.load_state_dict(state)
    assert torch.equal(compiled(x), start)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_the_module_can_be_exported():
    averager, x = _used(mlp()), torch.ones(1, 3)
    exported = torch.export.export(averager.module, (x,)).module()
    assert torch.equal(exported(x), averager(x))


def test_a_pickled_module_stands_for_itself():
    model, x = mlp(), torch.ones(1, 3)
    averager = _used(model, decay=0.5)
    expected = averager(x).clone()
    copies = pickle.loads(pickle.dumps(averager.module)), copy.deepcopy(averager.module)
    for _ in drifting(model, 2):
        averager.update()
    for module in copies:
        assert torch.equal(module(x), expected)


def test_a_tie_made_after_the_module_was_disturbs_nothing():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    averager = _used(model, decay=0.5)
    old = averager.module
    model[1].weight = model[0].weight
    averager.update()
    x = torch.ones(1, 2)
    with averager.applied(), torch.no_grad():
        expected = model(x)
    assert torch.equal(averager(x), expected)
    assert averager.module[0].weight is averager.module[1].weight
    old(x)


def test_a_mapping_has_no_module_and_says_so():
    averager = polyak.average({"w": torch.ones(2)})
    with pytest.raises(polyak.ModelError, match="no forward"):
        averager.module  # noqa: B018 - reading it raises
    with averager.applied():
        pass


class Stubborn(nn.Module):
    """Cannot be deep-copied or pickled, and refers to its parts from lists, dictionaries and bound methods."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.lock = threading.Lock()
        self.generator = torch.Generator()
        self.parts = [self.layer, {"norm": self.norm}]
        self.run = self._run

    def _run(self, x):
        with self.lock:
            return self.parts[1]["norm"](self.parts[0](x))

    def forward(self, x):
        return self.run(x)

    def __deepcopy__(self, memo):
        raise RuntimeError(memo)


def cached():
    model = mlp()
    model.cache = model[0].weight * 2  # a tensor with a history, which deepcopy refuses
    return model


def used_weight_norm():
    model = ZOO["old_weight_norm"].build()
    model(torch.ones(1, 3)).sum().backward()
    return model


@pytest.mark.parametrize("build", [Stubborn, cached, used_weight_norm, Recurrent], ids=lambda build: build.__name__)
def test_models_that_resist_copying_compute_with_the_average(build):
    model = build()
    x = torch.randn(4, 3) if build is not Recurrent else torch.randn(2, 5, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 3):
        averager.update()
    before = model_bits(model)
    model.eval()
    with torch.no_grad():
        result = averager(x)
        assert not torch.equal(result, model(x))
        with averager.applied():
            assert torch.equal(model(x), result)
    assert model_bits(model) == before


# Writing the average elsewhere


def test_copy_to_overwrites_the_model_for_good():
    model = Conv()
    averager = _used(model)
    objects = [*model.parameters()]
    expected = averager.averaged_state_dict()
    averager.copy_to()
    assert {n: bits(t) for n, t in model.state_dict().items()} == {n: bits(t) for n, t in expected.items()}
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    averager.update()


def test_copy_to_writes_into_another_model_of_any_dtype_and_wrapper():
    averager = _used(mlp())
    other = mlp().double()
    averager.copy_to(nn.DataParallel(other))
    assert torch.equal(other[0].weight, averager.averages["0.weight"].double())
    own = average_bits(averager)
    averager.update()
    assert average_bits(averager).keys() == own.keys()


def test_an_unpickled_averager_copies_to_a_model_it_is_given():
    averager = pickle.loads(pickle.dumps(_used(mlp())))
    other = mlp()
    averager.copy_to(other)
    assert torch.equal(other[0].weight, averager.averages["0.weight"])


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_the_averaged_state_dict_has_the_models_names_shapes_and_dtypes(kind):
    model = kind.build()
    averager = _used(model)
    own, averaged = model.state_dict(), averager.averaged_state_dict()
    assert list(averaged) == list(own)
    assert averaged._metadata == own._metadata
    for name, tensor in averaged.items():
        assert (tensor.shape, tensor.dtype, tensor.device) == (own[name].shape, own[name].dtype, own[name].device)
        assert not tensor.requires_grad
        assert type(tensor) is torch.Tensor
    live = {tensor.data_ptr() for tensor in own.values() if tensor.numel()}
    stored = {tensor.data_ptr() for tensor in averager.averages.values() if tensor.numel()}
    assert not (live | stored) & {tensor.data_ptr() for tensor in averaged.values() if tensor.numel()}


def test_the_averaged_state_dict_carries_extra_state_and_follows_state_dict_hooks():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            assert state == {"version": 3}

    model = nn.Sequential(Extra(2, 2), nn.Linear(2, 2))

    def rename(module, state, prefix, metadata):
        state["twice"] = state["0.weight"].detach() * 2
        del state["1.bias"]

    model.register_state_dict_post_hook(rename)
    averager = _used(model, decay=0.5)
    own = model_bits(model)
    averaged = averager.averaged_state_dict()
    assert averaged["0._extra_state"] == {"version": 3}
    assert torch.equal(averaged["twice"], averaged["0.weight"] * 2)
    assert torch.equal(averaged["0.weight"], averager.averages["0.weight"])
    assert "1.bias" not in averaged
    assert model_bits(model) == own


def test_the_averaged_state_dict_of_a_mapping_is_a_mapping():
    weights = {"w": torch.ones(2).bfloat16(), "n": torch.tensor(3), "left": torch.zeros(1)}
    averager = polyak.average(weights, "ema", decay=0.5, exclude="left")
    weights["w"].fill_(3.0)
    weights["n"].fill_(7)
    averager.update()
    averaged = averager.averaged_state_dict()
    assert averaged["w"].tolist() == [2.0, 2.0]
    assert averaged["w"].dtype == torch.bfloat16
    assert averaged["n"] == 7
    assert averaged["left"] is not weights["left"]


# Storage


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "torch.float64"], ids=str)
def test_a_dtype_is_a_name_or_a_torch_dtype(dtype):
    averager = polyak.average(ZOO["complex"].build(), dtype=dtype)
    assert averager.averages["filter"].dtype == torch.complex128
    assert polyak.average(Conv(), dtype=dtype).averages["norm.running_mean"].dtype == torch.float64
    assert polyak.average(Conv(), dtype=dtype).averages["norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("live", "stored"),
    [
        (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.float32), (torch.float8_e5m2, torch.float32),
        (torch.complex64, torch.complex64), (torch.complex128, torch.complex128), (torch.complex32, torch.complex64),
    ],
    ids=str,
)  # fmt: skip
def test_auto_stores_short_floats_in_float32(live, stored):
    weights = {"w": torch.ones(3).to(live)}
    averager = polyak.average(weights, "ema", decay=0.5)
    assert averager.averages["w"].dtype == stored
    weights["w"].copy_(torch.full((3,), 3.0))
    averager.update()
    assert averager.averages["w"].tolist() == [2.0, 2.0, 2.0]
    with averager.applied():
        assert weights["w"].to(stored).tolist() == [2.0, 2.0, 2.0]
    assert weights["w"].to(stored).tolist() == [3.0, 3.0, 3.0]


def test_a_device_is_a_name_or_a_torch_device():
    for device in ("cpu", torch.device("cpu"), None):
        assert polyak.average(mlp(), device=device).averages["0.weight"].device.type == "cpu"


def test_channels_last_averages_are_channels_last():
    averager = polyak.average(ZOO["channels_last"].build())
    assert averager.averages["conv.weight"].is_contiguous(memory_format=torch.channels_last)


# Copying and keeping


def test_a_deep_copy_goes_on_by_itself_with_the_same_model():
    model = mlp()
    averager = _used(model)
    other = copy.deepcopy(averager)
    assert average_bits(other) == average_bits(averager)
    for _ in drifting(model, 1):
        other.update()
    assert (other.n, averager.n) == (3, 2)
    assert average_bits(other) != average_bits(averager)


def test_a_deep_copy_inside_applied_has_the_average_and_not_the_weights():
    model = mlp()
    averager = _used(model)
    expected = average_bits(averager)
    with averager.applied():
        other, pickled = copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))
        assert not other.is_applied
    assert average_bits(other) == average_bits(pickled) == expected
    other.update()


def test_an_averager_and_its_model_are_freed_together():
    model = mlp()
    averager = _used(model)
    averager(torch.ones(1, 3))
    with averager.applied():
        pass
    watched = weakref.ref(model), weakref.ref(averager)
    del model, averager
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_listeners_hear_of_each_averaged_update_once():
    heard = []
    averager = polyak.average(mlp(), "ema", every=2)
    averager.updater.listeners.append(lambda who, clock: heard.append((who, clock.n, clock.step, who.n)))
    for _ in range(5):
        averager.update()
    assert heard == [(averager, 1, 2, 1), (averager, 2, 4, 2)]


def test_averagers_with_different_options_average_one_model_side_by_side():
    model = Conv()
    many = [
        polyak.average(model, name, **options)
        for name in ("ema", "swa", "ema_v3")
        for options in ({}, {"dtype": "float64"}, {"buffers": "skip"}, {"every": 2})
    ]
    before = model_bits(model)
    for averager in many:
        averager.update()
        with averager.applied():
            pass
        averager(torch.randn(1, 3, 8, 8))
    assert model_bits(model) == before


# An average that is hardly one


def _evaluations(averager, model):
    def applied():
        with averager.applied():
            pass

    return {
        "applied": applied,
        "module": lambda: averager.module,
        "call": lambda: averager(torch.ones(2, 3)),
        "copy_to": lambda: averager.copy_to(copy.deepcopy(model)),
        "averaged_state_dict": averager.averaged_state_dict,
    }


@pytest.mark.parametrize("how", ["applied", "module", "call", "copy_to", "averaged_state_dict"])
@pytest.mark.parametrize(("strategy", "share"), [("ema", 90), ("ema_v1", 99), ("dema", 81)])
def test_an_average_that_is_mostly_its_start_is_told_once_when_it_is_evaluated(how, strategy, share):
    model = mlp()
    averager = polyak.average(model, strategy)
    for _ in range(99):
        averager.update()
    for evaluate in _evaluations(averager, model).values():
        evaluate()
    averager.update()
    averager.state_dict()
    words = rf"after 100 updates the average is still {share}% the weights .*'ema_debiased' and origin='first'"
    with pytest.warns(polyak.PolyakWarning, match=words) as told:
        _evaluations(averager, model)[how]()
    assert told[0].filename == __file__
    for evaluate in _evaluations(averager, model).values():
        evaluate()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ema", {"decay": 0.99}),
        ("ema", {"origin": "first"}),
        ("ema", {"start": 10}),
        ("ema_debiased", {}),
        ("ema_tf", {}),
        ("ema_v3", {"use_warmup": True}),
        ("swa", {}),
        ("lawa", {"window": 2}),
        ("dema", {"decay": 0.9}),
    ],
)
def test_an_average_that_has_left_its_start_is_evaluated_without_a_word(strategy, options):
    model = mlp()
    averager = polyak.average(model, strategy, **options)
    for _ in range(110):
        averager.update()
    for evaluate in _evaluations(averager, model).values():
        evaluate()


def test_a_long_average_is_told_of_in_a_bank_and_after_a_resume_and_once_it_left_the_start_no_more():
    model = mlp()
    bank = polyak.bank(model, {"long": "ema", "short": {"name": "ema", "decay": 0.9}})
    for _ in drifting(model, 100):
        bank.update()
    with bank.applied("short"):
        pass
    resumed = polyak.average(model, "ema")
    resumed.load_state_dict(bank["long"].state_dict())
    with pytest.warns(polyak.PolyakWarning, match="still 90%"), bank.applied("long"):
        pass
    for _ in range(600):
        resumed.update()
    assert resumed.module is not None
