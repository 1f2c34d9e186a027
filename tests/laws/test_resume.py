"""Law 8: interrupted and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import polyak
from models import ZOO, average_bits, drifting, mlp
from oracle import strategies_to_try

TRIED = [pytest.param(name, settings, id=f"{name}-{i}") for i, (name, settings) in enumerate(strategies_to_try())]
STEPS = 12


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(averager):
    """Return all that an averager knows, for comparison."""
    state = averager.state_dict()
    (history,) = state.pop("history")
    tensors = {key: bytes(part.numpy()) if isinstance(part, torch.Tensor) else part for key, part in history.items()}
    generators = {name: bytes(value.numpy().tobytes()) for name, value in state.pop("generators")}
    state.pop("slots")
    return average_bits(averager), tensors, generators, state


def _update(averagers, model, number, *, given):
    """Update all at one step; the weights of step 5 are broken."""
    weight = next(model.parameters())
    kept = weight.detach().clone()
    if number == 5:
        weight.data.view(-1)[0] = torch.nan
    for averager in averagers:
        averager.update(step=number if given else None, lr=0.1 / number)
    weight.data.copy_(kept)


@pytest.mark.parametrize(("name", "settings"), TRIED)
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize(
    "options",
    [{}, {"nonfinite": "skip"}, {"start": 4, "every": 3, "nonfinite": "skip"}, {"dtype": "bfloat16"}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the weights hold NaN:polyak.PolyakWarning")
@pytest.mark.filterwarnings("ignore:1 element of the average:polyak.PolyakWarning")
@pytest.mark.filterwarnings("ignore:since the update:polyak.PolyakWarning")
def test_resuming_at_any_step_equals_never_stopping(name, settings, given, options):
    model = mlp()
    straight = polyak.average(model, name, **{**options, **settings})
    resumed = polyak.average(model, name, **{**options, **settings})
    for number in drifting(model, STEPS):
        state = saved_and_loaded(resumed.state_dict())
        resumed = polyak.average(model, name, **{**options, **settings})
        resumed.load_state_dict(state)
        _update([straight, resumed], model, number, given=given)
        assert everything(resumed) == everything(straight), f"after step {number}"
    assert straight.skipped == (options == {"nonfinite": "skip"})


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy"])
def test_any_model_resumes_through_a_file_or_a_copy(kind, way):
    model = kind.build()
    straight = polyak.average(model, "ema_v3", decay=0.9, use_warmup=True)
    for number in drifting(model, 8):
        straight.update()
        if number == 4:
            if way == "torch.save":
                resumed = polyak.average(kind.build(), "ema_v3", decay=0.9, use_warmup=True)
                resumed.load_state_dict(saved_and_loaded(straight.state_dict()))
            else:
                resumed = copy.deepcopy(straight) if way == "deepcopy" else pickle.loads(pickle.dumps(straight))
        elif number > 4:
            resumed.update(model)
    assert everything(resumed) == everything(straight)


def test_a_state_is_tensors_and_plain_types_and_carries_its_format():
    averager = polyak.average(mlp(), "ema", decay=0.5)
    averager.update()
    state = averager.state_dict()
    assert state["format"] == 2
    assert (state["n"], state["step"]) == (1, 1)
    assert state["strategy"] == {"name": "ema", "decay": 0.5}
    assert set(state["slots"]["average"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}

    def plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and plain(item) for key, item in value.items())
        if type(value) in {list, tuple}:
            return all(map(plain, value))
        return type(value) in {int, float, str, bool, type(None), torch.Tensor}

    assert plain(state)


def test_numbers_of_numpy_and_torch_leave_no_trace_in_the_state():
    import numpy as np

    averager = polyak.average(mlp(), "ema", decay=0.5)
    averager.update(step=np.int64(3), lr=np.float64(0.1))
    averager.update(step=torch.tensor(7), lr=torch.tensor(0.1))
    state = saved_and_loaded(averager.state_dict())
    assert type(state["step"]) is int
    assert state["step"] == 7


def test_a_state_is_a_copy_that_later_updates_leave_alone():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    state = averager.state_dict()
    before = {name: tensor.clone() for name, tensor in state["slots"]["average"].items()}
    for _ in drifting(model, 2):
        averager.update()
    assert all(torch.equal(before[name], tensor) for name, tensor in state["slots"]["average"].items())


def test_a_float32_average_is_never_cut_down_on_load():
    model = mlp().bfloat16()
    wide = polyak.average(model, "ema", decay=0.999)
    for _ in drifting(model, 3):
        wide.update()
    narrow = polyak.average(mlp().bfloat16(), "ema", decay=0.999, dtype="bfloat16")
    narrow.load_state_dict(saved_and_loaded(wide.state_dict()))
    assert average_bits(narrow) == average_bits(wide)
    for _ in drifting(model, 3):
        wide.update()
        narrow.update(model)
    assert average_bits(narrow) == average_bits(wide)


def test_a_bfloat16_average_goes_on_in_the_float32_that_was_asked_for():
    narrow = polyak.average(mlp(), "ema", decay=0.5, dtype="bfloat16")
    wide = polyak.average(mlp(), "ema", decay=0.5)
    wide.load_state_dict(narrow.state_dict())
    assert {tensor.dtype for tensor in wide.averages.values()} == {torch.float32}
    assert torch.equal(wide.averages["0.weight"], narrow.averages["0.weight"].float())


@pytest.mark.parametrize("n", [0, 3])
def test_a_state_whose_plugin_is_missing_loads_and_only_the_next_update_raises(n):
    class Gone(polyak.Strategy):
        name: str = "gone"
        power: float = 0.5

        def rate(self, clock):
            return clock.n**-self.power

        def engine(self):
            return {"origin": "first"}

    model = mlp()
    averager = polyak.average(model, Gone(power=0.7))
    for _ in drifting(model, n):
        averager.update()
    loaded = polyak.average(model, "swa")
    loaded.load_state_dict(saved_and_loaded(averager.state_dict()))
    assert average_bits(loaded) == average_bits(averager)
    with loaded.applied():
        assert loaded.is_applied
    before = everything(loaded)
    with pytest.raises(polyak.UnknownStrategyError, match="'gone', which is not installed"):
        loaded.update()
    assert everything(loaded) == before
    assert loaded.state_dict()["strategy"] == {"name": "gone", "power": 0.7}
