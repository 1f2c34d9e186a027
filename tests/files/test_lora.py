"""Adapters: the mean of the products, by PEFT's own arithmetic."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyak import files
from polyak.errors import ConfigError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 4)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x))))


def base():
    torch.manual_seed(0)
    return Net().double()


def adapter(seed, **settings):
    """Return an adapter of PEFT with random factors."""
    peft = pytest.importorskip("peft")
    config = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["embed", "first", "second", "conv"],
        "modules_to_save": ["head"],
    }
    model = peft.get_peft_model(base(), peft.LoraConfig(**{**config, **settings}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def merged(model):
    return model.merge_and_unload().state_dict()


def loaded(folder):
    peft = pytest.importorskip("peft")
    return merged(peft.PeftModel.from_pretrained(base(), folder))


def saved(tmp_path, *models):
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    return [tmp_path / str(number) for number in range(len(models))]


def mean_of(models, shares):
    states = [merged(model) for model in models]
    return {name: sum(w * state[name] for w, state in zip(shares, states, strict=True)) for name in states[0]}


DIFFERENT = (
    {}, {"use_rslora": True}, {"r": 2, "lora_alpha": 5}, {"rank_pattern": {"first": 4}, "alpha_pattern": {"first": 9}},
)  # fmt: skip


@pytest.mark.parametrize("second", DIFFERENT)
def test_concatenation_is_exact(second, tmp_path):
    models = [adapter(1), adapter(2, **second)]
    paths, shares = saved(tmp_path, *models), [0.3, 0.7]
    made = files.average(paths, shares, lora="concatenate", out=tmp_path / "mean")
    wanted, got = mean_of(models, shares), loaded(made.out)
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5), name


def test_svd_is_the_best_of_its_rank_and_tells_its_error(tmp_path):
    models = [adapter(1), adapter(2)]
    paths, shares = saved(tmp_path, *models), [0.5, 0.5]
    plain = base().state_dict()
    wanted = mean_of(models, shares)
    for rank in (2, 6):
        made = files.average(paths, shares, lora="svd", rank=rank, out=tmp_path / f"r{rank}")
        got = loaded(made.out)
        delta = wanted["first.weight"] - plain["first.weight"]
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose(got["first.weight"] - plain["first.weight"], best, atol=1e-4)
        error = float(made.notes[0].rpartition(" ")[2])
        assert (error < 1e-6) == (rank == 6)


def test_factors_tell_their_error(tmp_path):
    models = [adapter(1), adapter(2)]
    paths = saved(tmp_path, *models)
    made = files.average(paths, lora="factors", out=tmp_path / "mean")
    first, second = (load_file(path / "adapter_model.safetensors") for path in paths)
    got = load_file(made.out / "adapter_model.safetensors")
    for name in first:
        assert torch.allclose(got[name], (first[name] + second[name]) / 2, atol=1e-6)
    error, size = 0.0, 0.0
    for name in (name for name in first if "lora_A" in name or "embedding_A" in name):
        up = name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        exact = sum(one[up].flatten(1).double() @ one[name].flatten(1).double() for one in (first, second)) / 2
        error += (exact - got[up].flatten(1).double() @ got[name].flatten(1).double()).square().sum().item()
        size += exact.square().sum().item()
    assert float(made.notes[0].rpartition(" ")[2]) == pytest.approx((error / size) ** 0.5, rel=1e-2)


def test_kohyas_files(tmp_path):
    def state(seed, rank, alpha):
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, (outputs, inputs) in {"lora_unet_a": ((4,), (5,)), "lora_te_b": ((4, 1, 1), (3, 3, 3))}.items():
            made[f"{name}.lora_down.weight"] = torch.randn(rank, *inputs, generator=generator)
            made[f"{name}.lora_up.weight"] = torch.randn(outputs[0], rank, *outputs[1:], generator=generator)
            made[f"{name}.alpha"] = torch.tensor(float(alpha))
        return made

    def delta(one, name):
        down, up = one[f"{name}.lora_down.weight"], one[f"{name}.lora_up.weight"]
        return one[f"{name}.alpha"] / down.shape[0] * up.flatten(1) @ down.flatten(1)

    states = [state(0, 2, 1), state(1, 3, 8)]
    for number, one in enumerate(states):
        save_file(one, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for options in ({"lora": "concatenate"}, {"lora": "svd", "rank": 5}):
        files.average(paths, [0.25, 0.75], out=tmp_path / "mean.safetensors", **options)
        got = load_file(tmp_path / "mean.safetensors")
        assert {*got} == {*states[0]}
        assert got["lora_te_b.lora_down.weight"].shape[1:] == (3, 3, 3)
        for name in ("lora_unet_a", "lora_te_b"):
            wanted = 0.25 * delta(states[0], name) + 0.75 * delta(states[1], name)
            assert torch.allclose(delta(got, name), wanted, atol=1e-5)
    with pytest.raises(MismatchError, match="differ in rank"):
        files.average(paths, lora="factors", out=tmp_path / "o.safetensors")


def test_adapters_are_refused_without_a_choice_and_others_always(tmp_path):
    paths = saved(tmp_path, adapter(1), adapter(2))
    out = tmp_path / "mean"
    with pytest.raises(ConfigError, match="product of mean factors is not the mean of the products"):
        files.average(paths, out=out)
    for wrong in ({"lora": "svd"}, {"lora": "concatenate", "rank": 3}, {"lora": "sum"}):
        with pytest.raises(ConfigError, match="lora"):
            files.average(paths, out=out, **wrong)
    dora = tmp_path / "dora"
    adapter(1, use_dora=True, target_modules=["first"]).save_pretrained(dora)
    with pytest.raises(ConfigError, match="DoRA"):
        files.average([paths[0], dora], out=out, lora="concatenate")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="hold no adapter"):
        files.average(
            [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out=tmp_path / "o.pt", lora="svd", rank=1
        )
    assert not out.exists()
