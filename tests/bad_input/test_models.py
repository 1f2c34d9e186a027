"""Models that cannot be averaged, and models that changed: refused, and nothing was written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from models import Conv, mlp, model_bits
from refusals import refused, used

# Models


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), {}], ids=str)
def test_a_model_without_tensors_is_refused(model):
    with pytest.raises(polyak.ModelError, match="no parameters and no buffers"):
        polyak.average(model)


def test_a_model_with_nothing_to_average_is_refused():
    with pytest.raises(polyak.ModelError, match="nothing is left to average"):
        polyak.average({"count": torch.tensor(1)})


@pytest.mark.parametrize("model", [torch.ones(1), None, "model", nn.Linear], ids=lambda m: type(m).__name__)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(polyak.ModelError, match=r"a model is a torch\.nn\.Module, a mapping"):
        polyak.average(model)


def test_a_list_of_other_things_is_refused():
    with pytest.raises(polyak.ModelError, match="got Linear at '1'"):
        polyak.average([torch.ones(1), nn.Linear(1, 1)])


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


CHANGED = [
    (_lost, "missing: 2.bias"),
    (_gained, "new: 3.weight"),
    (_reshaped, "reshaped: 2.weight is (3, 5) and was (2, 5)"),
]


@pytest.mark.parametrize(("build", "words"), CHANGED, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("match", ["name", "order"])
def test_an_update_with_a_model_of_another_structure_is_refused(build, words, match):
    averager = used(mlp(), match=match)
    with refused(averager, polyak.MismatchError, words, "Nothing was changed"):
        averager.update(build())
    averager.update()


def test_a_renamed_model_is_refused_by_name_and_by_order_where_some_names_stayed():
    averager = used(mlp())
    with refused(averager, polyak.MismatchError, "missing: 0.weight", "new: 1.weight"):
        averager.update(_renamed())
    averager = used(mlp(), "ema_v2")
    partly = mlp()
    partly[1], partly[2] = partly[2], nn.Identity()
    with refused(averager, polyak.MismatchError, "missing: 2.weight", "new: 1.weight"):
        averager.update(partly)


def test_a_model_with_other_names_altogether_is_taken_by_order():
    averager = used(mlp(), "ema_v2")
    averager.update(_renamed())
    assert averager.n == 3
    with refused(averager, polyak.MismatchError, "3 tensors where 4 were expected"):
        averager.update({"a": torch.ones(5, 3), "b": torch.ones(5), "c": torch.ones(2, 5)})
    with refused(averager, polyak.MismatchError, "reshaped: d is (3,) and was (2,)"):
        averager.update({"a": torch.ones(5, 3), "b": torch.ones(5), "c": torch.ones(2, 5), "d": torch.ones(3)})


def test_modules_that_changed_places_are_refused_when_matched_by_order():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    averager = used(nn.ModuleDict({"a": model[0], "b": model[1]}), "ema_v2")
    with refused(averager, polyak.MismatchError, "moved: a.weight"):
        averager.update(nn.ModuleDict({"b": model[1], "a": model[0]}))


def test_modules_that_changed_places_are_followed_when_matched_by_name():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    averager = used(nn.ModuleDict({"a": model[0], "b": model[1]}), "ema")
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
    averager = used(model)
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
    averager, other = used(mlp()), _reshaped()
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
