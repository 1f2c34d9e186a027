"""Loops of real scripts, in small: run with the library's class and with the stand-in, by one changed import."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils as torch_theirs

from polyak.compat import diffusers as diffusers_ours, timm as timm_ours, torch as torch_ours

pytestmark = pytest.mark.parity
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 4, generator=generator)
        yield x, (x.sum(1) > 0).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def assert_same(ours, theirs):
    assert [*ours] == [*theirs]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def swa_tutorial(library):
    """torch's own example: SWA from the fourth epoch on, with its rate, then batch norm once."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swa_model = library.AveragedModel(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    swa_scheduler = library.SWALR(optimizer, swa_lr=0.05)
    for epoch in range(8):
        for x, y in batches(6, seed=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if epoch > 3:
            swa_model.update_parameters(model)
            swa_scheduler.step()
        else:
            scheduler.step()
    library.update_bn(batches(4), swa_model)
    return swa_model


def test_the_tutorial_of_torchs_swa():
    theirs, ours = swa_tutorial(torch_theirs), swa_tutorial(torch_ours)
    assert int(ours.n_averaged) == 4
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.fixture
def timm_used(monkeypatch):
    """Undo what timm.use() puts in timm's place."""
    pytest.importorskip("timm", reason="a test dependency, left out with the oldest torch")
    import timm.task.task
    import timm.utils
    import timm.utils.model_ema

    for module in (timm.utils, timm.utils.model_ema, timm.task.task, timm.utils.model):
        for name in ("ModelEma", "ModelEmaV2", "ModelEmaV3"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))


def timm_task(tmp_path):
    """timm's training loop: a task with an EMA, its checkpoint, and a second run that goes on from it."""
    from timm.task import ClassificationTask

    def made():
        task = ClassificationTask(network(), criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"))
        task.setup_ema(decay=0.98, use_warmup=True)
        return task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)

    def train(task, optimizer, first, last):
        for step in range(first, last + 1):
            ((x, y),) = batches(1, seed=step)
            optimizer.zero_grad()
            task(x, y)["loss"].backward()
            optimizer.step()
            task.update_ema(step=step)

    task, optimizer = made()
    train(task, optimizer, 1, 20)
    torch.save({"model": task.get_trainable_module().state_dict(),
                "ema": task.get_trainable_module(ema=True).state_dict()}, tmp_path / "last.pt")  # fmt: skip
    found = torch.load(tmp_path / "last.pt")
    resumed, optimizer = made()
    resumed.get_trainable_module().load_state_dict(found["model"])
    resumed.get_trainable_module(ema=True).load_state_dict(found["ema"])
    train(resumed, optimizer, 21, 30)
    return resumed.get_trainable_module(ema=True)


def test_the_task_of_timms_training_script(timm_used, tmp_path):
    theirs = timm_task(tmp_path)
    timm_ours.use()
    ours = timm_task(tmp_path)
    assert isinstance(ours, timm_ours.ModelEmaV3)
    assert not isinstance(theirs, timm_ours.ModelEmaV3)
    assert_same(ours.state_dict(), theirs.state_dict())


def diffusers_loop(cls, tmp_path):
    """diffusers' training examples: the EMA of a UNet moved to its device, stored around each validation, and saved."""
    model = network()
    ema = cls(model.parameters(), decay=0.99, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, model_cls=nn.Module)
    ema.to("cpu")
    optimizer, validated = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for number, (x, y) in enumerate(batches(20)):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        if number % 5 == 4:
            before = copy.deepcopy(model.state_dict())
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            validated.append([parameter.detach().clone() for parameter in model.parameters()])
            ema.restore(model.parameters())
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = cls(model.parameters())
    other.load_state_dict(torch.load(tmp_path / "ema.pt"))
    other.to(dtype=torch.float64)
    other.step(model.double().parameters())
    return ema, other, validated


def test_the_loop_of_diffusers_examples(tmp_path):
    utils = pytest.importorskip("diffusers.training_utils", reason="a test dependency, left out with the oldest torch")
    theirs, ours = diffusers_loop(utils.EMAModel, tmp_path), diffusers_loop(diffusers_ours.EMAModel, tmp_path)
    for first, second in zip(ours[:2], theirs[:2], strict=True):
        assert first.optimization_step == second.optimization_step
        assert first.cur_decay_value == second.cur_decay_value
        torch.testing.assert_close(first.shadow_params, second.shadow_params, **CLOSE)
    torch.testing.assert_close(ours[2], theirs[2], **CLOSE)
