"""What trainers leave: their steps, what else is in their files, shards of ranks, and names of files."""

from __future__ import annotations

import argparse
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import polyak
from files.conftest import weights
from polyak import files
from polyak.errors import ConfigError, MissingFileError, StateError


def fairseq(epoch: int, updates: int, value: float) -> dict:
    """Return a checkpoint with the keys and classes that fairseq documents."""
    history = {"criterion_name": "CrossEntropy", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": None}}
    return {
        "args": argparse.Namespace(arch="transformer", lr=[5e-4], adam_betas="(0.9, 0.98)"),
        "cfg": None,
        "model": OrderedDict(w=torch.full((3,), value), version=torch.tensor([3.0])),
        "criterion": nn.CrossEntropyLoss(),
        "optimizer_history": [{**history, "num_updates": 5}, {**history, "num_updates": updates}],
        "task_state": {},
        "extra_state": {"epoch": epoch, "val_loss": 3.95, "train_iterator": {"epoch": epoch}, "metrics": []},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
    }


def test_fairseq_counts_by_its_updates_and_none_of_its_classes_is_loaded(tmp_path):
    paths = [tmp_path / f"checkpoint.best_loss_3.{k}.pt" for k in (91, 85, 70)]
    for number, path in enumerate(paths, 1):
        torch.save(fairseq(number, 1000 * number, float(number)), path)
    made = files.average(paths[::-1], last=2, until=2000, out=tmp_path / "o.pt")
    assert made.steps == (1000, 2000)
    assert torch.load(made.out)["w"].tolist() == [1.5] * 3
    assert "argparse.Namespace" in " ".join(made.notes)


def test_a_fraction_in_a_name_is_no_step(tmp_path):
    for name, step in {"val_loss=0.25.pt": None, "epoch=3-val_loss=0.25.pt": 3, "10epoch.pth": 10}.items():
        torch.save({"w": torch.ones(2)}, tmp_path / name)
        with files.open(tmp_path / name) as checkpoint:
            assert checkpoint.step == step


def test_the_step_is_in_the_folder_of_the_file(tmp_path):
    steps = {"checkpoint-900/model": 900, "checkpoint-1000/model": 1000, "020000/pretrained_model/model": 20000,
             "global_step7/mp_model": 7, "run-3/model": None, "2024/best": None}  # fmt: skip
    for name, step in steps.items():
        (path := tmp_path / "out" / f"{name}.safetensors").parent.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, path)
        with files.open(path) as checkpoint:
            assert checkpoint.step == step, name
    paths = (tmp_path / "out").glob("checkpoint-*/model.safetensors")
    assert files.average(paths, last=2, out=tmp_path / "o.pt").steps == (900, 1000)


def test_what_else_holds_tensors_is_named(tmp_path):
    state, head = weights(0), {"0.weight": torch.ones(2)}
    torch.save({"model": state, "generator": head, "opt": argparse.Namespace()}, tmp_path / "onmt.pt")
    torch.save({"model": state, "model_avg": state, "grad_scaler": {"scale": torch.ones(1)}}, tmp_path / "icefall.pt")
    with files.open(tmp_path / "onmt.pt") as checkpoint:
        assert checkpoint.names == [*state]
        assert any("further tensors in 'generator'" in note for note in checkpoint.notes)
    with files.open(tmp_path / "onmt.pt", key="generator") as checkpoint:
        assert checkpoint.names == [*head]
    with files.open(tmp_path / "icefall.pt") as checkpoint:
        assert any("an average, too, in 'model_avg'" in note for note in checkpoint.notes)
        assert not any("further" in note for note in checkpoint.notes)


def test_shards_of_zero_stage_3_hold_no_weights(tmp_path, left):
    shard = {"module": {"w": torch.empty(0), "running_mean": torch.ones(2)}, "param_shapes": [{"w": torch.Size([6])}]}
    paths = [tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)]
    for path in paths:
        torch.save(shard, path)
    before = left()
    with pytest.raises(StateError, match=r"ZeRO stage 3: 'w' has the shape \(0,\) in it, and \(6,\) in the model"):
        files.average(paths, out=tmp_path / "o.pt")
    with pytest.raises(StateError, match="Gather the shards of all ranks"):
        files.open(tmp_path)
    assert left() == before
    placeholder = tmp_path / "placeholder.pt"  # of older releases
    torch.save({**shard, "module": {"w": torch.ones(1)}}, placeholder)
    with pytest.raises(StateError, match=r"has the shape \(1,\).*zero_to_fp32"):
        files.open(placeholder)
    model = tmp_path / "pytorch_model.bin"  # as trainers write it of what is partitioned
    torch.save({"a": torch.empty(0), "b": torch.empty(0), "running_mean": torch.ones(2)}, model)
    with pytest.raises(StateError, match=r"tensors without values, such as 'a'.*zero_to_fp32"):
        files.open(model)
    torch.save({**shard, "module": {"w": torch.ones(6)}, "global_steps": 40}, tmp_path / "stage-2.pt")
    with files.open(tmp_path / "stage-2.pt") as checkpoint:
        assert checkpoint.step == 40


def test_a_copy_counts_twice_and_is_told(run, tmp_path):
    shutil.copy(run[-1], tmp_path / "last.safetensors")
    everything = [*run, tmp_path / "last.safetensors"]
    made = files.average(everything, out=tmp_path / "o.pt")
    assert made.notes == (f"last.safetensors has the same bytes as {run[-1].name}, which so count twice",)
    assert files.average(run, out=tmp_path / "o.pt").notes == ()
    assert (
        files.average(everything, out=tmp_path / "o.pt", hashes=False).notes == ()
    )  # without hashes the bytes are not compared


def test_names_that_are_nearly_right(run, tmp_path, left):
    before = left()
    with pytest.raises(MissingFileError, match=r"a pattern is expanded by a shell, or by glob\.glob"):
        files.average([tmp_path / "*.safetensors"], out=tmp_path / "o.pt")
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        shutil.copy(run[step], folder / "model.safetensors")
    before = left()
    with pytest.raises(ConfigError, match=r"did you mean '\.safetensors'"):
        files.average([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], out=tmp_path / "o.safetensor")
    assert left() == before
    assert files.average([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], out=tmp_path / "o-3.1").out.is_dir()


@pytest.mark.parametrize(
    "strategy",
    ["ema", "ema_debiased", "ema_v3", "ema_tf", "swa", "polynomial", "power", "tail", "lawa", "dema",
     {"name": "ema_halflife", "halflife": 150}, {"name": "block_mean", "length": 2}],
    ids=str,
)  # fmt: skip
def test_a_strategy_over_files_is_an_averager_that_the_first_file_began(strategy, tmp_path):
    model = {"w": torch.zeros(5, dtype=torch.float64)}
    averager = polyak.average(model, strategy, origin="first", every=100)
    for number in range(5):
        step = 100 * (number + 1)
        model["w"].zero_()[number] = 1.0
        averager.update(step=step)
        torch.save(dict(model), tmp_path / f"step-{step}.pt")
    paths = [tmp_path / f"step-{step}.pt" for step in (100, 200, 300, 400, 500)]
    made = files.average(paths, strategy, out=tmp_path / "o.pt")
    torch.testing.assert_close(torch.load(made.out)["w"], averager.averages["w"], rtol=1e-12, atol=1e-15)
    assert made.weights == pytest.approx(averager.averages["w"].tolist(), rel=1e-9, abs=1e-15)


def test_swa_over_files_is_what_torch_makes_of_them(tmp_path):
    model = nn.Linear(4, 3)
    average = AveragedModel(model)
    for step in (10, 20, 30):
        nn.init.normal_(model.weight)
        average.update_parameters(model)
        torch.save(model.state_dict(), tmp_path / f"step-{step}.pt")
    made = files.average([tmp_path / f"step-{step}.pt" for step in (10, 20, 30)], "swa", out=tmp_path / "o.pt")
    assert made.weights == pytest.approx((1 / 3,) * 3)
    torch.testing.assert_close(torch.load(made.out), average.module.state_dict())
