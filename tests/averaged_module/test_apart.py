"""What the averaged module does changes neither the model nor the average."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import polyak
from held_modules import KINDS, Merging, applied, everything
from models import Conv, drifting, mlp


class Deploying(nn.Module):
    """A root that folds a scale into a layer below it in eval mode."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(2.0))
        self.folded = False

    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.folded:
            self.layer.weight.data.mul_(self.scale.data)
            self.folded = True
        return self

    def forward(self, x):
        weight = self.layer.weight if self.folded else self.layer.weight * self.scale
        return functional.linear(x, weight, self.layer.bias)


REWRITING = {
    "merging": lambda: nn.Sequential(Merging(3), nn.ReLU(), Merging(3)),
    "deploying": Deploying,
}


@pytest.mark.parametrize("build", REWRITING.values(), ids=REWRITING)
@pytest.mark.parametrize("options", [{}, {"include": "adapters"}, {"dtype": "float64"}], ids=str)
def test_a_module_that_merges_weights_in_eval_mode_leaves_the_model_and_the_average_alone(build, options):
    model, x = build(), torch.randn(2, 3)
    if "include" in options:
        options = {"include": ["scale"] if build is Deploying else ["*down", "*up"]}
    averager = polyak.average(model, "ema", decay=0.5, **options)
    for _ in drifting(model, 3):
        averager.update()
        before, expected = everything(model, averager), applied(averager, lambda: model(x))
        teacher = averager.module
        for mode in (True, False, False, True, False):
            torch.testing.assert_close(teacher.train(mode)(x), expected)
            torch.testing.assert_close(averager(x), expected)
        assert everything(model, averager) == before


@pytest.mark.parametrize("buffers", ["auto", "skip", "copy", "average"])
def test_a_teacher_in_train_mode_moves_neither_the_model_s_nor_the_average_s_statistics(buffers):
    model = Conv()
    averager = polyak.average(model, "ema", decay=0.5, buffers=buffers)
    for _ in drifting(model, 1):
        averager.update()
    before, x = everything(model, averager), torch.randn(4, 3, 8, 8)
    teacher = averager.module.train()
    teacher(x + 3)
    assert everything(model, averager) == before
    model.eval()
    if buffers == "skip":
        own = teacher.norm.running_mean.clone()
        averager.update()
        assert torch.equal(teacher.eval().norm.running_mean, own)  # a mean teacher's own statistics
        assert torch.equal(averager.module.norm.running_mean, own)
    else:
        assert torch.equal(teacher.eval()(x), applied(averager, lambda: model(x)))


def test_skipped_buffers_follow_the_model_s_until_the_module_writes_its_own():
    model = Conv().eval()
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip")
    teacher, x = averager.module, torch.randn(4, 3, 8, 8)
    for _ in drifting(model, 2):
        averager.update()
        assert torch.equal(teacher.norm(x[:, [0, 1, 2, 0]]), applied(averager, lambda: model.norm(x[:, [0, 1, 2, 0]])))


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_forwards_of_the_module_write_nothing_of_the_model_or_the_average(kind):
    model = kind.build()
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip" if kind.name == "conv" else "auto")
    averager.update()
    before = everything(model, averager)
    teacher = averager.module
    for mode in (True, False, True):
        teacher.train(mode)
        teacher(kind.example())
        averager.module.zero_grad()
        teacher.state_dict()
    assert everything(model, averager) == before


def test_parameters_that_are_not_averaged_share_the_model_s_memory_and_follow_it():
    model = mlp()
    model[0].requires_grad_(False)
    averager = polyak.average(model, "ema", include="2.*")
    teacher = averager.module
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averager.update()
    assert torch.equal(teacher[0].weight, model[0].weight)
    model[0].weight = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
    teacher(torch.ones(1, 3))
    assert torch.equal(teacher[0].weight, model[0].weight)
    assert teacher[0].weight is not model[0].weight
    assert teacher[0].weight.data_ptr() == model[0].weight.data_ptr()
    teacher.half()
    assert model[0].weight.dtype == torch.float32


# Hooks


def test_hooks_that_the_model_s_classes_made_compute_and_others_are_left_to_the_model():
    class Doubling(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_forward_hook(lambda module, args, result: result * 2)
            self.register_forward_pre_hook(self.shift)

        def shift(self, module, args):
            return (args[0] + self.bias,)

    model, x, seen = nn.Sequential(Doubling(), nn.Linear(3, 3)), torch.randn(2, 3), []
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 1):
        averager.update()
    expected = applied(averager, lambda: model(x))
    model[0].register_forward_hook(partial(lambda kept, *_: kept.append(1), seen))
    model[1].register_forward_pre_hook(lambda *_: seen.append(1))
    model.register_forward_hook(lambda *_: seen.append(1) or None)
    with pytest.warns(polyak.PolyakWarning, match=r"forward hooks .* Sequential"):
        assert torch.equal(averager(x), expected)
    assert not seen
    averager.module.register_forward_hook(lambda *_: seen.append(2))
    averager(x)
    assert seen == [2]
