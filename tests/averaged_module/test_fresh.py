"""`averager.module`, held: whatever computes with it computes with the average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from held_modules import KINDS, Merging, Scaled, applied
from models import drifting, mlp
from polyak.engine.averaged_module.module import AveragedModule
from polyak.engine.plan import plan as plans


@pytest.fixture
def passes(monkeypatch):
    """Count how often averages are written into a module."""
    counted = []
    write = AveragedModule._write
    monkeypatch.setattr(AveragedModule, "_write", lambda *args: (counted.append(1), write(*args))[1])
    return counted


class Staged(nn.Module):
    """A model with a method next to `forward`, and a parameter that no submodule owns."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def features(self, x):
        return self.encoder(x) + self.offset

    def forward(self, x):
        return self.head(self.features(x))


# Held: fresh by every method, submodule and form


@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"dtype": "bfloat16"}, {"buffers": "copy"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_held_module_is_fresh_by_every_method_and_submodule(dtype, options):
    model = Staged().to(dtype).eval()
    averager = polyak.average(model, "ema", decay=0.5, **options)
    teacher, x = averager.module, torch.randn(5, 3, dtype=dtype)
    encoder, weight = teacher.encoder, teacher.head.weight
    for _ in drifting(model, 3):
        averager.update()
        with torch.no_grad():
            assert torch.equal(teacher.features(x), applied(averager, lambda: model.features(x)))
            assert torch.equal(encoder(x), applied(averager, lambda: model.encoder(x)))
            assert torch.equal(weight, applied(averager, lambda: model.head.weight.clone()))
    state = averager.state_dict()
    for _ in drifting(model, 2, seed=7):
        averager.update()
    averager.load_state_dict(state)
    assert torch.equal(teacher.features(x), applied(averager, lambda: model.features(x)))
    with averager.applied():
        assert torch.equal(teacher.features(x), model.features(x))
    assert averager.module is teacher


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_module_of_every_kind_is_fresh_after_each_update(kind):
    model = kind.build().eval()
    averager = polyak.average(model, "ema", decay=0.5)
    forward, x = averager.module.forward, kind.example()
    for _ in drifting(model, 2):
        averager.update()
        with torch.no_grad():
            assert torch.equal(forward(x), applied(averager, lambda: model(x)))


def test_the_modules_of_a_bank_are_fresh():
    model, x = Staged().bfloat16().eval(), torch.randn(2, 3).bfloat16()
    bank = polyak.bank(model, {"short": {"name": "ema", "decay": 0.5}, "mean": "swa", "window": "lawa"})
    teachers = {name: averager.module for name, averager in bank.items()}
    for _ in drifting(model, 3):
        bank.update()
        for name, teacher in teachers.items():
            assert torch.equal(teacher.features(x), applied(bank[name], lambda: model.features(x)))


def test_the_module_of_an_average_that_lives_elsewhere_is_fresh_when_update_returns(monkeypatch):
    monkeypatch.setattr(plans, "crosses", lambda average, live: True)
    model, x = Staged().bfloat16().eval(), torch.randn(2, 3).bfloat16()
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    assert averager.core.pending is not None  # nobody holds the module: the update runs in the background
    teacher = averager.module
    for _ in drifting(model, 3):
        averager.update()
        features = teacher.features(x)
        assert torch.equal(features, applied(averager, lambda: model.features(x)))


def test_a_module_is_fresh_before_the_first_update_that_counts():
    model, x = Staged().eval(), torch.randn(2, 3)
    averager = polyak.average(model, "swa", start=10)
    teacher = averager.module
    for _ in drifting(model, 2):
        averager.update()
        assert torch.equal(teacher.features(x), model.features(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_held_module_is_fresh_while_other_averages_of_its_model_are_applied(dtype):
    model, x = Staged().to(dtype).eval(), torch.randn(2, 3, dtype=dtype)
    short, long = polyak.average(model, "ema", decay=0.5), polyak.average(model, "ema", decay=0.9)
    teacher = short.module
    for _ in drifting(model, 2):
        short.update()
        long.update()
    expected = teacher.features(x)
    with short.applied():
        assert torch.equal(teacher.features(x), expected)
        with long.applied():
            assert torch.equal(teacher.features(x), expected)
        assert torch.equal(teacher.features(x), expected)
    assert torch.equal(teacher.features(x), expected)


def test_only_what_is_held_is_converted_and_once_per_update(passes):
    model, x = Staged().bfloat16().eval(), torch.randn(2, 3).bfloat16()
    averager = polyak.average(model, "ema", decay=0.5)

    def written():
        passes.clear()
        averager.update()
        at_once = len(passes)
        averager(x), averager.module(x), averager.module.features(x)
        return at_once, len(passes)

    averager.update()
    assert not passes
    averager(x)
    assert written() == (0, 1)
    for hold in (
        lambda: averager.module,
        lambda: averager.module.encoder,
        lambda: averager.module.head.weight,
        lambda: averager.module.features,
        lambda: [*averager.module.parameters()][-1],
        lambda: torch.compile(averager.module, backend="eager"),
    ):
        held = hold()
        assert written() == (1, 1)
        del held
        assert written() == (0, 1)


def test_what_interrupts_a_refresh_leaves_a_module_that_the_next_one_completes(monkeypatch):
    model, x = nn.Sequential(Merging(3), nn.BatchNorm1d(3)).bfloat16(), torch.randn(2, 3).bfloat16()
    averager = polyak.average(model, "ema", decay=0.5)
    teacher, take = averager.module, AveragedModule._take

    def interrupted(*args):
        take(*args)
        raise KeyboardInterrupt

    for _ in drifting(model, 1):
        with monkeypatch.context() as patch:
            patch.setattr(AveragedModule, "_take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                averager.update()
    assert averager.n == 1
    assert not any(part.training for part in teacher.modules())
    model.eval()
    expected = applied(averager, lambda: model(x))
    torch.testing.assert_close(teacher(x), expected)


def _alpha(model):
    model.alpha = 3.0


def _scaling(model):
    model.scaling["default"] = 0.25


def _stages(model):
    model.stages[0][0] = 7.0


def _act(model):
    model.act = torch.tanh


@pytest.mark.parametrize("change", [_alpha, _scaling, _stages, _act])
@pytest.mark.parametrize("look", ["update", "module", "call", "root"])
def test_attributes_are_as_of_the_last_update_access_or_call(change, look):
    model, x = Scaled(), torch.randn(2, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    teacher = averager.module
    teacher(x)
    change(model)
    if look == "update":
        averager.update()
        result = teacher.forward(x)
    elif look == "module":
        result = averager.module.forward(x)
    else:
        result = averager(x) if look == "call" else teacher(x)
    assert torch.equal(result, applied(averager, lambda: model(x)))


def test_an_attribute_set_on_the_module_stays_until_the_model_s_changes():
    model = Scaled()
    averager = polyak.average(model, "ema")
    teacher = averager.module
    teacher.alpha = 9.0
    averager.update()
    assert averager.module.alpha == 9.0
    assert model.alpha == 1.0
    model.alpha = 2.0
    averager.update()
    assert teacher.alpha == 2.0
    del model.alpha
    averager.update()
    assert not hasattr(teacher, "alpha")


def test_what_is_neither_module_nor_tensor_nor_container_is_shared():
    class Buffer:
        items = ()

    model = mlp()
    model.replay, model.optimizer = Buffer(), torch.optim.Adam(model.parameters())
    model.seen = [Buffer(), model[0]]
    averager = polyak.average(model, "ema")
    teacher = averager.module
    assert teacher.replay is model.replay
    assert teacher.optimizer is model.optimizer
    assert teacher.seen[0] is model.seen[0]
    assert teacher.seen[1] is teacher[0]


def test_a_helper_that_refers_to_the_model_is_copied_with_it():
    class Helper:
        def __init__(self, module):
            self.module = module

        def __call__(self, x):
            return self.module[0](x)

    class Net(nn.Sequential):
        def forward(self, x):
            return self.helper(x)

    model, x = Net(nn.Linear(3, 3)), torch.randn(2, 3)
    model.helper = Helper(model)
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 1):
        averager.update()
    assert torch.equal(averager(x), applied(averager, lambda: model(x)))
