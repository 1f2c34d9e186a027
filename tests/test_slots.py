"""Strategies that keep several tensors: exact, whole or absent, resumed, saved, copied and refused like all others."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from interrupts import AtOperation, at_line
from models import ZOO, Tied, average_bits, bits, drifting, mlp
from polyak import MismatchError, StateError, UnknownStrategyError
from polyak.engine import pending, updates
from polyak.engine.plan import moves, plan, tensor_update
from polyak.strategy.shares import recursion_shares

SLOTTED = [
    pytest.param("lawa", {"window": 3}, id="lawa"),
    pytest.param("lawa", {"window": 1}, id="lawa-1"),
    pytest.param("dema", {"decay": 0.7}, id="dema"),
    pytest.param("dema", {"decay": 0.7, "origin": "first"}, id="dema-first"),
]
BOTH = [SLOTTED[0], SLOTTED[2]]
MOVING = (moves, tensor_update, updates, pending, plan)


def all_bits(averager):
    """Return the bits of the average and of all slots."""
    slots = averager.state_dict()["slots"]
    return {(slot, name): bits(tensor) for slot, tensors in slots.items() for name, tensor in tensors.items()}


def _moved(build, name, settings, *, steps=2, **options):
    model = build()
    averager = polyak.average(model, name, **settings, **options)
    for _ in drifting(model, steps):
        averager.update()
    return model, averager


@pytest.mark.parametrize(("name", "settings"), SLOTTED)
@pytest.mark.parametrize("kernel", ["loop", "foreach", "fused", "auto"])
@pytest.mark.parametrize("cadence", [{}, {"every": 3}, {"start": 6}, {"start": 5, "every": 2}], ids=str)
def test_one_hot_weights_give_exactly_the_profile(name, settings, kernel, cadence):
    weights = torch.zeros(25, dtype=torch.float64)
    weights[0] = 1.0
    averager = polyak.average({"w": weights}, name, kernel=kernel, **{**settings, **cadence})
    for step in range(1, 25):
        weights.zero_()[step] = 1.0
        averager.update()
    profile = averager.profile()
    wanted = np.zeros(25)
    wanted[0] = profile.start
    wanted[profile.steps] += profile.shares
    np.testing.assert_allclose(averager.averages["w"], wanted, rtol=1e-12, atol=1e-16)
    assert profile.start + profile.shares.sum() == pytest.approx(1.0, abs=1e-13)


def test_a_window_is_the_plain_mean_of_the_latest_weights():
    model = nn.Linear(3, 2).double()
    averager = polyak.average(model, "lawa", window=4, every=2)
    seen = []
    for number in drifting(model, 20):
        averager.update()
        if number % 2 == 0:
            seen.append(model.weight.detach().clone())
        if seen:
            torch.testing.assert_close(averager.averages["weight"], torch.stack(seen[-4:]).mean(0), rtol=0, atol=1e-15)


def test_a_double_ema_is_twice_the_ema_less_the_ema_of_it():
    model = nn.Linear(3, 2).double()
    averager = polyak.average(model, "dema", decay=0.8)
    first = second = model.weight.detach().clone()
    for _ in drifting(model, 15):
        averager.update()
        first = 0.8 * first + 0.2 * model.weight.detach()
        second = 0.8 * second + 0.2 * first
        torch.testing.assert_close(averager.averages["weight"], 2 * first - second, rtol=0, atol=1e-14)


def test_a_double_ema_is_where_weights_on_a_line_are():
    weights = torch.zeros(1, dtype=torch.float64)
    average, single = (polyak.average({"w": weights}, name, decay=0.9) for name in ("dema", "ema"))
    for step in range(1, 401):
        weights.fill_(step)
        average.update()
        single.update()
    assert average.averages["w"].item() == pytest.approx(400, abs=1e-6)
    assert single.averages["w"].item() == pytest.approx(391, abs=1e-6)


@pytest.mark.parametrize(("name", "settings"), BOTH)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "kernel"), [("buffers", "foreach"), ("tied", "loop")])
def test_ctrl_c_at_any_operation_of_an_update_leaves_all_of_it_or_nothing(name, settings, when, kind, kernel):
    model, averager = _moved(ZOO[kind].build, name, settings, kernel=kernel)
    for _ in drifting(model, 1, seed=3):
        pass
    state, old = averager.state_dict(), all_bits(averager)
    averager.load_state_dict(state)
    averager.averaged_state_dict()
    with AtOperation() as counter:
        averager.update()
    new, seen = all_bits(averager), set()
    assert new != old
    for k in range(counter.seen):
        averager.load_state_dict(state)
        averager.averaged_state_dict()  # plans anew, outside of what is interrupted
        with pytest.raises(KeyboardInterrupt), AtOperation(k, when):
            averager.update()
        found = (all_bits(averager), averager.n, len(averager.profile()))
        assert found in [(old, 2, 2), (new, 3, 3)], f"operation {k} of {counter.seen}"
        seen.add(averager.n)
    assert seen == {2, 3}


@pytest.mark.parametrize(("name", "settings"), BOTH)
@pytest.mark.parametrize("options", [{"nonfinite": "propagate"}, {"kernel": "foreach"}], ids=str)
def test_ctrl_c_at_any_line_of_an_update_leaves_all_of_it_or_nothing(name, settings, options):
    model, averager = _moved(lambda: nn.BatchNorm1d(2), name, settings, **options)
    for _ in drifting(model, 1, seed=3):
        pass
    state, old = averager.state_dict(), all_bits(averager)
    averager.update()
    averager.load_state_dict(state)
    averager.averaged_state_dict()
    with at_line(MOVING) as lines:
        averager.update()
    new, wrong = all_bits(averager), []
    assert any(line.startswith("moves.py") for line in lines)
    for k, line in enumerate(lines):
        averager.load_state_dict(state)
        averager.averaged_state_dict()
        with pytest.raises(KeyboardInterrupt), at_line(MOVING, k):
            averager.update()
        torch.set_grad_enabled(
            True
        )  # a tracer raises between a block and its __exit__, too, where no signal is handled
        if (all_bits(averager), averager.n, len(averager.profile())) not in [(old, 2, 2), (new, 3, 3)]:
            wrong.append(line)
    assert not wrong


@pytest.mark.parametrize(("name", "settings"), SLOTTED)
@pytest.mark.parametrize("kernel", ["loop", "foreach", "fused"])
def test_weights_that_are_not_finite_are_left_out(name, settings, kernel):
    model, averager = _moved(mlp, name, {**settings, "nonfinite": "skip"}, kernel=kernel, steps=5)
    straight = copy.deepcopy(averager)
    before = all_bits(averager)
    kept = model[0].weight.detach().clone()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.warns(polyak.PolyakWarning, match="0.weight"):
        averager.update(step=6)
    assert all_bits(averager) == before
    assert (averager.n, averager.skipped) == (5, 1)
    model[0].weight.data.copy_(kept)
    for number, _ in enumerate(drifting(model, 4, seed=1), start=7):
        averager.update(step=number)
        straight.update(model, step=number)
    assert all_bits(averager) == all_bits(straight)


@pytest.mark.parametrize(("name", "settings"), BOTH)
def test_weights_that_are_not_finite_raise_where_that_is_wanted(name, settings):
    model, averager = _moved(mlp, name, settings, nonfinite="raise")
    before = all_bits(averager)
    model[2].bias.data[0] = torch.inf
    with pytest.raises(polyak.NonFiniteError, match=r"2\.bias"):
        averager.update()
    assert all_bits(averager) == before


@pytest.mark.parametrize(("name", "settings"), SLOTTED)
@pytest.mark.parametrize("way", ["state", "torch.save", ".pt", ".safetensors", "pickle", "deepcopy"])
@pytest.mark.parametrize("kind", ["tied", "complex", "buffers"])
def test_resumed_at_any_moment_equals_never_stopped(name, settings, way, kind, tmp_path):
    build = ZOO[kind].build
    model = build()
    straight, resumed = (polyak.average(model, name, **settings) for _ in range(2))
    for _ in drifting(model, 9):
        if way == "deepcopy":
            resumed = copy.deepcopy(resumed)
        elif way == "pickle":
            resumed = pickle.loads(pickle.dumps(resumed))
        else:
            before, resumed = resumed, polyak.average(model, name, **settings)
            if way == "state":
                resumed.load_state_dict(before.state_dict())
            elif way == "torch.save":
                file = io.BytesIO()
                torch.save(before.state_dict(), file)
                resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            else:
                polyak.save(before, tmp_path / f"state{way}")
                polyak.load(resumed, tmp_path / f"state{way}")
        straight.update()
        resumed.update(model)
        assert all_bits(resumed) == all_bits(straight)
    assert resumed.profile().distance(straight.profile()) == 0.0


@pytest.mark.parametrize(("name", "settings"), BOTH)
def test_a_copy_shares_no_slot_with_the_original(name, settings):
    model, averager = _moved(mlp, name, settings)
    other, before = copy.deepcopy(averager), all_bits(averager)
    for _ in drifting(model, 3, seed=5):
        other.update(model)
    assert all_bits(averager) == before
    assert all_bits(other) != before


@pytest.mark.parametrize("kernel", ["loop", "foreach", "fused"])
def test_in_a_bank_each_is_bit_for_bit_what_it_is_alone(kernel):
    wanted = {
        "window": {"name": "lawa", "window": 3},
        "sparse": {"name": "lawa", "window": 2, "every": 2},
        "no lag": {"name": "dema", "decay": 0.8},
        "ema": {"name": "ema", "decay": 0.9},
        "strict": {"name": "dema", "decay": 0.5, "nonfinite": "raise"},
    }
    model = Tied()
    bank = polyak.bank(model, wanted, kernel=kernel)
    alone = {name: polyak.average(model, dict(w)["name"], kernel=kernel, **{k: v for k, v in w.items() if k != "name"})
             for name, w in wanted.items()}  # fmt: skip
    for number in drifting(model, 9):
        if number == 5:
            saved = bank.state_dict()
            bank = polyak.bank(model, wanted, kernel=kernel)
            bank.load_state_dict(saved)
        bank.update()
        for averager in alone.values():
            averager.update()
    for name, averager in alone.items():
        assert all_bits(bank[name]) == all_bits(averager), name
        assert bank[name].profile().distance(averager.profile()) == 0.0


@pytest.mark.parametrize(("name", "settings"), SLOTTED)
@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_the_kernels_agree(name, settings, kind):
    model = kind.build()
    kernels = ("loop", "foreach", "fused")
    plain, each, fast = (polyak.average(model, name, kernel=kernel, **settings) for kernel in kernels)
    exact = polyak.average(model, name, kernel="loop", dtype="float64", **settings)
    for _ in drifting(model, 8):
        for averager in (plain, each, fast, exact):
            averager.update()
    assert all_bits(plain) == all_bits(each)
    if name == "lawa":
        assert all_bits(plain) == all_bits(fast)
    for key, tensor in exact.averages.items():
        if tensor.numel() and tensor.itemsize > 1 and (tensor.is_floating_point() or tensor.is_complex()):
            scale = tensor.abs().nan_to_num(posinf=0.0).max().clamp(min=1).item()
            for averager in (plain, fast):
                got = averager.averages[key]
                room = 8 * torch.finfo(got.dtype).eps * scale  # as many updates
                torch.testing.assert_close(got.to(tensor.dtype), tensor, rtol=0, atol=room)


@pytest.mark.parametrize(("name", "settings"), BOTH)
@pytest.mark.parametrize("stored", ["auto", "bfloat16"])
def test_a_bfloat16_model_is_averaged_in_what_was_asked_for(name, settings, stored):
    model = mlp().bfloat16()
    averager = polyak.average(model, name, dtype=stored, **settings)
    exact = polyak.average(model, name, dtype="float64", **settings)
    for _ in drifting(model, 12):
        averager.update()
        exact.update()
    dtype = torch.float32 if stored == "auto" else torch.bfloat16
    for slot, tensors in averager.state_dict()["slots"].items():
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}, slot
    room = 40 * torch.finfo(dtype).eps
    for key, tensor in exact.averages.items():
        torch.testing.assert_close(averager.averages[key].double(), tensor, rtol=0, atol=room)


@pytest.mark.parametrize(("name", "settings"), BOTH)
def test_ties_that_are_made_and_broken_later_are_followed_in_every_slot(name, settings):
    model = Tied()
    averager = polyak.average(model, name, **settings)
    for _ in drifting(model, 3):
        averager.update()
    model.head.weight = nn.Parameter(model.emb.weight.detach().clone())
    apart = polyak.average(model, name, **settings)
    for _ in drifting(model, 6, seed=2):
        averager.update()
        apart.update()
    assert {"emb.weight", "head.weight"} <= {*averager.averages}
    for slot, tensors in averager.state_dict()["slots"].items():
        pointers = [tensor.data_ptr() for tensor in tensors.values()]
        assert len({*pointers}) == len(pointers), slot
    if name == "lawa":  # its window has forgotten the time before
        assert average_bits(averager) == average_bits(apart)


@pytest.mark.parametrize(("name", "settings"), BOTH)
def test_a_model_that_moves_to_another_dtype_takes_its_slots_along(name, settings):
    model, averager = _moved(mlp, name, settings)
    model.double()
    for _ in drifting(model, 3):
        averager.update()
    assert averager.n == 5
    assert {t.dtype for tensors in averager.state_dict()["slots"].values() for t in tensors.values()} == {torch.float32}


def test_a_state_with_another_window_is_refused_and_changes_nothing():
    _, averager = _moved(mlp, "lawa", {"window": 3}, steps=4)
    before = all_bits(averager)
    _, other = _moved(mlp, "lawa", {"window": 4}, steps=4)
    with pytest.raises(StateError, match=r"snapshot_3.*Nothing was loaded"):
        averager.load_state_dict(other.state_dict())
    assert all_bits(averager) == before
    damaged = averager.state_dict()
    damaged["slots"]["snapshot_1"]["0.weight"] = torch.zeros(7)
    with pytest.raises(StateError, match=r"snapshot_1: reshaped: 0\.weight"):
        averager.load_state_dict(damaged)
    del damaged["slots"]["snapshot_1"]["0.weight"]
    with pytest.raises(StateError, match=r"snapshot_1: missing: 0\.weight"):
        averager.load_state_dict(damaged)
    assert all_bits(averager) == before


def test_a_state_of_another_model_is_refused():
    _, averager = _moved(mlp, "dema", {"decay": 0.5})
    _, other = _moved(Tied, "dema", {"decay": 0.5})
    with pytest.raises(StateError, match="another model"):
        averager.load_state_dict(other.state_dict())
    with pytest.raises(MismatchError):
        averager.update(Tied())


def test_the_state_of_a_plugin_with_slots_that_is_missing_loads_and_only_its_update_raises():
    class Gone(polyak.Strategy):
        name: str = "gone_with_slots"

        def rate(self, clock):
            return 0.5

        def slots(self):
            return ("trail",)

        def moves(self, n, rate):
            return (polyak.Move("trail", "weights", rate), polyak.Move("average", "trail", rate))

        def shares(self, rates):
            return recursion_shares(rates)  # which is wrong, and not asked for here

    model = Tied()
    averager = polyak.average(model, Gone())
    for _ in drifting(model, 4):
        averager.update()
    loaded = polyak.average(model, "ema")
    loaded.load_state_dict(averager.state_dict())
    assert all_bits(loaded) == all_bits(averager)
    with loaded.applied():
        assert bits(model.emb.weight) == average_bits(averager)["emb.weight"]
    with pytest.raises(UnknownStrategyError, match="'gone_with_slots', which is not installed"):
        loaded.update()
    with pytest.raises(UnknownStrategyError, match="gone_with_slots"):
        loaded.profile()
    again = polyak.average(model, Gone())
    again.load_state_dict(loaded.state_dict())
    assert all_bits(again) == all_bits(averager)


@pytest.mark.parametrize(("name", "settings"), BOTH)
def test_a_captured_graph_is_refused(name, settings):
    with pytest.raises(polyak.ConfigError, match="capturable"):
        polyak.average(mlp(), name, capturable=True, nonfinite="propagate", **settings)


def test_the_memory_of_all_slots_is_told():
    model = {"w": torch.zeros(256)}  # 1 KiB
    assert "1 tensor, 5.0 KiB, 4 slots beside each average" in polyak.average(model, "lawa", window=4).describe()
    assert "1 tensor, 3.0 KiB, 2 slots beside each average" in polyak.average(model, "dema").describe()
    assert "slot" not in polyak.average(model, "ema").describe()


@pytest.mark.parametrize(("name", "settings"), SLOTTED)
def test_what_is_copied_is_the_latest_and_has_no_slots(name, settings):
    model, averager = _moved(ZOO["buffers"].build, name, settings, steps=5)
    assert averager.averages["count"].item() == model.count.item() == 5
    assert torch.equal(averager.averages["flags"], model.flags)
    for slot, tensors in averager.state_dict()["slots"].items():
        assert ("count" in tensors) == (slot == "average")
    with averager.applied():
        assert model.count.item() == 5


def test_before_the_first_update_there_is_the_start_or_the_weights_as_they_are():
    model = mlp()
    late, early = polyak.average(model, "lawa", window=2), polyak.average(model, "dema")
    start = bits(model[0].weight)
    for _ in drifting(model, 1):
        pass
    assert average_bits(late)["0.weight"] == bits(model[0].weight)
    assert average_bits(early)["0.weight"] == start


@pytest.mark.parametrize(
    "made",
    [
        [],
        [polyak.Move("elsewhere", "weights", 0.5)],
        [polyak.Move("average", "elsewhere", 0.5)],
        [polyak.Move("average", "weights", float("nan"))],
    ],
    ids=str,
)
def test_moves_that_make_no_sense_are_refused_and_nothing_moves(made):
    class Odd(polyak.Strategy):
        name: str = "odd"

        def rate(self, clock):
            return 0.5

        def slots(self):
            return ("here",)

        def moves(self, n, rate):
            return made

        def shares(self, rates):
            return recursion_shares(rates)

    model = mlp()
    averager = polyak.average(model, Odd())
    before = all_bits(averager)
    for _ in drifting(model, 1):
        pass
    with pytest.raises(polyak.RateError, match="Odd"):
        averager.update()
    assert all_bits(averager) == before


def test_a_strategy_with_slots_that_does_not_say_its_moves_or_shares_is_refused():
    with pytest.raises(TypeError, match=r"Silent has slots and lacks moves\(\) or shares\(\)"):

        class Silent(polyak.Strategy):
            name: str = "silent"

            def rate(self, clock):
                return 0.5

            def slots(self):
                return ("here",)
