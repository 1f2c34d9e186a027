"""`polyak.files.open`: what each format holds, without executing anything."""

from __future__ import annotations

import argparse
import collections

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import polyak
from files.conftest import weights
from polyak import files
from polyak.errors import ConfigError, MissingFileError, StateError


def same(checkpoint, state):
    assert {*checkpoint.names} == {*state}
    for name, tensor in state.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(read.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


EVERY = {
    str(dtype): torch.arange(12).reshape(3, 4).to(dtype)
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.bool, torch.complex64,
    )
}  # fmt: skip


def test_every_dtype_of_safetensors_and_torch(tmp_path):
    save_file(EVERY, tmp_path / "a.safetensors")
    torch.save({**EVERY, "c": torch.ones(2, dtype=torch.complex128)}, tmp_path / "a.pt")
    with files.open(tmp_path / "a.safetensors") as checkpoint:
        same(checkpoint, EVERY)
    with files.open(tmp_path / "a.pt") as checkpoint:
        same(checkpoint, torch.load(tmp_path / "a.pt"))


def test_the_older_format_of_torch(tmp_path):
    base = torch.randn(4, 6)
    state = {"a": base, "b": base[1:], "t": base.t(), "i": torch.arange(3), "p": nn.Parameter(torch.ones(2))}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with files.open(tmp_path / "a.pt") as checkpoint:
        same(checkpoint, {name: tensor.detach() for name, tensor in state.items()})
        assert checkpoint.format == "torch (legacy)"


def test_a_part_of_a_tensor(tmp_path):
    state = weights(0)
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"t": state["embed.weight"].t()}, tmp_path / "a.pt")
    with files.open(tmp_path / "a.safetensors") as checkpoint:
        assert torch.equal(checkpoint.read("embed.weight", 7, 19), state["embed.weight"].flatten()[7:19])
        with pytest.raises(ConfigError, match="values 7 to 900 of a tensor with 320"):
            checkpoint.read("embed.weight", 7, 900)
        with pytest.raises(ConfigError, match=r"Did you mean 'embed\.weight'"):
            checkpoint.read("embed.weigth")
    with files.open(tmp_path / "a.pt") as checkpoint:
        assert torch.equal(checkpoint.read("t", 7, 19), state["embed.weight"].t().flatten()[7:19])


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module", "params", "net", "weights"])
def test_the_usual_keys_of_dictionaries(key, tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    whole = {
        "optimizer": optimizer.state_dict(), key: model.state_dict(), "lr_scheduler": {"last": 3}, "epoch": 2,
        "global_step": 70, "best": torch.tensor(0.5), "rng": torch.get_rng_state(),
    }  # fmt: skip
    torch.save(whole, tmp_path / "last.pt")
    with files.open(tmp_path / "last.pt") as checkpoint:
        same(checkpoint, model.state_dict())
        assert (checkpoint.key, checkpoint.step) == (key, 70)


def test_dictionaries_of_well_known_trainers(tmp_path):
    state = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}
    nano = {"model": {f"_orig_mod.{name}": one for name, one in state.items()}, "optimizer": {"param_groups": []},
            "model_args": {"n_layer": 2}, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {}}  # fmt: skip
    lightning = {"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5", "state_dict": state, "loops": {},
                 "callbacks": {"EMA": {"w": torch.ones(1)}}, "optimizer_states": [{"state": {0: torch.ones(2)}}],
                 "hyper_parameters": collections.OrderedDict(lr=0.1)}  # fmt: skip
    timm = {"epoch": 12, "arch": "vit", "state_dict": state, "state_dict_ema": state, "args": argparse.Namespace(lr=1),
            "metric": np.float64(80.5), "version": 2}  # fmt: skip
    fairseq = {"args": None, "cfg": argparse.Namespace(task="t"), "model": state, "last_optimizer_state": {},
               "optimizer_history": [{"num_updates": 3}], "extra_state": {}, "step": np.int64(33)}  # fmt: skip
    composer = {
        "state": {"model": state, "optimizers": {"Adam": {"param_groups": []}}},
        "rng": [torch.ones(3)],
    }
    ddp = {"module": {f"module.module.{name}": one for name, one in state.items()}, "global_steps": 3}
    swa = {"n_averaged": torch.tensor(3), **{f"module.{name}": one for name, one in state.items()}}
    cases = {"nano": (nano, 5), "lightning": (lightning, 9), "timm-12": (timm, 12), "fairseq": (fairseq, 33),
             "composer": (composer, None), "ddp": (ddp, 3), "swa": (swa, None)}  # fmt: skip
    for name, (whole, step) in cases.items():
        torch.save(whole, tmp_path / f"{name}.pt")
        with files.open(tmp_path / f"{name}.pt") as checkpoint:
            same(checkpoint, state)
            assert checkpoint.step == step, name
    with files.open(tmp_path / "timm-12.pt") as checkpoint:
        assert any("'state_dict_ema'" in note for note in checkpoint.notes)
        assert any("argparse.Namespace" in note for note in checkpoint.notes)
    with files.open(tmp_path / "timm-12.pt", key="state_dict_ema") as checkpoint:
        assert checkpoint.key == "state_dict_ema"


def test_a_models_own_submodule_called_module_keeps_its_name(tmp_path):
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    torch.save(state, tmp_path / "a.pt")
    with files.open(tmp_path / "a.pt") as checkpoint:
        same(checkpoint, state)


def test_several_candidates_are_named(tmp_path):
    state = {"w": torch.ones(2)}
    torch.save({"generator": state, "discriminator": state, "step": 3}, tmp_path / "gan.pt")
    with pytest.raises(ConfigError, match=r"'generator' or 'discriminator'"):
        files.open(tmp_path / "gan.pt")
    with files.open(tmp_path / "gan.pt", key="generator") as checkpoint:
        assert checkpoint.names == ["w"]
    with pytest.raises(ConfigError, match=r"no key 'critic'; there are 'generator', 'discriminator'"):
        files.open(tmp_path / "gan.pt", key="critic")
    torch.save({"a.b": {"c": state}}, tmp_path / "dots.pt")
    with files.open(tmp_path / "dots.pt", key="a.b.c") as checkpoint:
        assert checkpoint.names == ["w"]


def test_tied_names_are_groups(tmp_path):
    w = torch.ones(3, 2)
    torch.save({"a": w, "b": w, "c": w[1:], "d": w.clone()}, tmp_path / "a.pt")
    with files.open(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.tied == (("a", "b"),)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_polyaks_own_averagers(suffix, tmp_path):
    model = nn.Linear(2, 2)
    averager = polyak.average(model, "dema", decay=0.5)
    nn.init.ones_(model.weight)
    averager.update()
    polyak.save(averager, tmp_path / f"own.{suffix}")
    with files.open(tmp_path / f"own.{suffix}") as checkpoint:
        same(checkpoint, dict(averager.averages))
        assert checkpoint.step == 1
        assert "polyak's own" in checkpoint.notes[0]


def test_polyaks_own_banks_and_snapshots(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)  # in a file of its own
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "swa"})
    with polyak.posthoc.Recorder(bank, tmp_path / "run", every=2):
        for _ in range(4):
            nn.init.normal_(model[1].weight)
            bank.update()
    polyak.save(bank, tmp_path / "bank.pt")
    with pytest.raises(ConfigError, match=r"'bank\.a' or 'bank\.b'"):
        files.open(tmp_path / "bank.pt")
    with files.open(tmp_path / "bank.pt", key="bank.b") as checkpoint:
        same(checkpoint, dict(bank["b"].averages))
    with files.open(tmp_path / "run" / "b-000000000004.safetensors") as checkpoint:
        same(checkpoint, bank["b"].averaged_state_dict())
        assert checkpoint.step == 4


def test_nothing_is_imported_or_called(tmp_path, monkeypatch):
    class Spy:
        def __reduce__(self):
            return print, ("called",)

    torch.save(
        {"w": torch.ones(1), "x": collections.Counter("aab"), "n": argparse.Namespace(a=1), "v": torch.ones(1)},
        tmp_path / "a.pt",
    )
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *_, **__: pytest.fail("made"))
    with files.open(tmp_path / "a.pt", key=None) as checkpoint:
        assert checkpoint.names == ["w", "v"]
    torch.save({"w": torch.ones(1), "spy": Spy()}, tmp_path / "spy.pt")
    with pytest.raises(StateError, match=r"builtins\.print|__builtin__\.print"):
        files.open(tmp_path / "spy.pt")


def test_what_is_missing(tmp_path):
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        files.open(tmp_path / "none.pt")
    with pytest.raises(MissingFileError):
        files.open("x" * 5000)
    with pytest.raises(polyak.errors.ArgumentError):
        files.open(3)
