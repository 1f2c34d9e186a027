"""Resume: interrupted equals uninterrupted, bit for bit, at every phase, through files, across changes of storage."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import polyak
from models import Conv, Fourier, Tied

STRATEGIES = {
    "ema": {"decay": 0.9},
    "ema_v1": {"decay": 0.9},
    "ema_v2": {"decay": 0.9},
    "ema_v3": {"decay": 0.99, "use_warmup": True, "update_after_step": 2},
    "ema_debiased": {"decay": 0.9},
    "swa": {},
}
NAN_AT = 7


def drive(model: nn.Module, averager: polyak.Averager, steps: range) -> None:
    """Step through weights that depend on the step alone; step 7 has a NaN."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            if step == NAN_AT:
                next(iter(model.parameters())).view(-1)[0] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", polyak.PolyakWarning)  # the NaN step is left out on purpose
            averager.update(step=step)


def same(a: polyak.Averager, b: polyak.Averager) -> bool:
    bits = all(torch.equal(tensor, b.averages[name]) for name, tensor in a.averages.items())
    profiles = a.profile().shares.tolist() == b.profile().shares.tolist()
    return bits and profiles and (a.n, a.rate, a.skipped) == (b.n, b.rate, b.skipped)


@pytest.mark.parametrize("stop", [0, 1, 3, 6, 7, 8, 11], ids=lambda stop: f"after {stop}")
@pytest.mark.parametrize(("strategy", "settings"), STRATEGIES.items(), ids=STRATEGIES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_interrupted_equals_uninterrupted_at_every_phase(tmp_path, suffix, strategy, settings, stop):
    model = Conv()
    options = {"every": 2, "start": 2, "dtype": "bfloat16" if stop % 2 else "auto"}
    whole = polyak.average(model, strategy, **options, **settings)
    resumed = polyak.average(model, strategy, **options, **settings)
    drive(model, whole, range(1, stop + 1))
    polyak.save(whole, tmp_path / f"average{suffix}")
    polyak.load(resumed, tmp_path / f"average{suffix}")
    drive(model, whole, range(stop + 1, 15))
    drive(model, resumed, range(stop + 1, 15))
    assert whole.n > 0
    assert same(whole, resumed)


@pytest.mark.parametrize("build", [Tied, Fourier], ids=lambda build: build.__name__)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_ties_and_complex_tensors_go_through_files(tmp_path, build, suffix):
    model = build()
    averager, other = polyak.average(model, "ema", decay=0.5), polyak.average(model, "ema", decay=0.5)
    drive(model, averager, range(1, 4))
    polyak.save(averager, tmp_path / f"average{suffix}")
    polyak.load(other, tmp_path / f"average{suffix}")
    assert same(averager, other)


def test_a_wider_average_comes_back_whole_into_a_narrower_one():
    model = Conv()
    wide, narrow = (polyak.average(model, "ema", decay=0.9, dtype=dtype) for dtype in ("float64", "auto"))
    drive(model, wide, range(1, 4))
    narrow.load_state_dict(wide.state_dict())
    drive(model, wide, range(4, 9))
    drive(model, narrow, range(4, 9))
    assert same(wide, narrow)


def test_a_safetensors_file_says_how_it_was_made(tmp_path):
    from safetensors import safe_open

    model = Conv()
    averager = polyak.average(model, "ema", decay=0.9)
    drive(model, averager, range(1, 4))
    polyak.save(averager, tmp_path / "average.safetensors")
    with safe_open(tmp_path / "average.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["polyak"])
        assert torch.equal(file.get_tensor("average/head.weight"), averager.averages["head.weight"])
    assert about["strategy"] == {"name": "ema", "decay": 0.9}
    assert (about["n"], about["profile"]["half_life"]) == (3, str(averager.profile().half_life))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_is_whole_or_absent(tmp_path, suffix, monkeypatch):
    model = Conv()
    averager = polyak.average(model, "ema", decay=0.9)
    path = tmp_path / f"average{suffix}"
    polyak.save(averager, path)
    before = path.read_bytes()
    drive(model, averager, range(1, 3))

    def full(self, target):
        message = "No space left on device"
        raise OSError(message)

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        polyak.save(averager, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_missing_a_truncated_and_a_foreign_file_are_refused_and_nothing_changes(tmp_path, suffix):
    model = Conv()
    averager = polyak.average(model, "ema", decay=0.9)
    drive(model, averager, range(1, 3))
    path = tmp_path / f"average{suffix}"
    polyak.save(averager, path)
    before = {name: tensor.clone() for name, tensor in averager.averages.items()}
    (tmp_path / f"short{suffix}").write_bytes(path.read_bytes()[:-100])
    (tmp_path / f"foreign{suffix}").write_bytes(b"not a file of tensors")
    other = polyak.average(nn.Linear(2, 2), "ema", decay=0.9)
    polyak.save(other, tmp_path / f"other{suffix}")
    expected = {
        "missing": "there is no file",
        "short": "earlier file",
        "foreign": "earlier file",
        "other": "belongs to another model",
    }
    for name, message in expected.items():
        with pytest.raises(polyak.StateError, match=message):
            polyak.load(averager, tmp_path / f"{name}{suffix}")
    assert averager.n == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in averager.averages.items())


def test_another_file_type_is_refused(tmp_path):
    averager = polyak.average(nn.Linear(2, 2), "ema")
    with pytest.raises(polyak.ConfigError, match=r"expected .safetensors, .pt or .pth"):
        polyak.save(averager, tmp_path / "average.bin")
