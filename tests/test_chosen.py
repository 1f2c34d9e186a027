"""Everything that takes a strategy takes every way to name one."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf

import polyak
from models import mlp
from polyak import posthoc
from polyak.testing import check_strategy


@dataclass
class Settings:
    name: str = "ema"
    decay: float = 0.5


PLAIN = {"name": "ema", "decay": 0.5}
ONLY = {
    "object": polyak.EMA(decay=0.5),
    "mapping": PLAIN,
    "namespace": Namespace(**PLAIN),
    "dataclass": Settings(),
    "omegaconf": OmegaConf.create(PLAIN),
    "config": polyak.AveragerConfig(strategy=PLAIN),
}
WHOLE = {
    "mapping": {"strategy": PLAIN, "every": 2, "include": ["*.weight"]},
    "namespace": Namespace(strategy=Namespace(**PLAIN), every=2, include=["*.weight"]),
    "omegaconf": OmegaConf.create({"strategy": PLAIN, "every": 2, "include": ["*.weight"]}),
    "config": polyak.AveragerConfig(strategy=PLAIN, every=2, include="*.weight"),
}


@pytest.mark.parametrize("way", ONLY.values(), ids=ONLY)
def test_a_strategy_is_named_in_every_way_everywhere(way):
    wanted = polyak.EMA(decay=0.5)
    assert polyak.average(mlp(), way).strategy == wanted
    assert polyak.bank(mlp(), {"one": way})["one"].strategy == wanted
    assert polyak.AveragerConfig(strategy=way).strategy == wanted
    assert polyak.convert(way, "power", steps=100).wanted.distance(polyak.Profile.of(wanted, 100)) == 0
    check_strategy(way)


@pytest.mark.parametrize("way", WHOLE.values(), ids=WHOLE)
def test_a_whole_config_is_taken_in_every_way(way):
    for averager in (polyak.average(mlp(), way, dtype="float64"), polyak.bank(mlp(), {"a": way}, dtype="float64")["a"]):
        assert averager.strategy == polyak.EMA(decay=0.5)
        assert (averager.options.every, averager.options.include) == (2, ("*.weight",))
        assert averager.options.dtype == "float64"


@pytest.mark.parametrize("way", [*ONLY.values(), *WHOLE.values()], ids=[*ONLY, *(f"whole {name}" for name in WHOLE)])
def test_a_target_is_named_in_every_way(way, tmp_path):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5, every=2 if way in WHOLE.values() else 1)
    recorder = posthoc.Recorder(averager, tmp_path, every=4)
    for _ in range(8):
        with torch.no_grad():
            model[0].weight.add_(1)
        averager.update()
    recorder.close()
    made = posthoc.synthesize(tmp_path, way)
    assert torch.equal(made.state_dict["0.weight"], averager.averages["0.weight"])
    assert (
        posthoc.sweep(tmp_path, lambda state: 0.0, [way], output=tmp_path / "x.safetensors")
        .rows[0]
        .label.startswith("ema(decay=0.5")
    )


def test_what_a_config_says_is_not_said_again():
    config = polyak.AveragerConfig(strategy=PLAIN, every=2)
    with pytest.raises(polyak.ConfigError, match="'every' given beside a config that says it"):
        polyak.average(mlp(), config, every=5)
    with pytest.raises(polyak.ConfigError, match="It is a setting of the strategy"):
        polyak.average(mlp(), config, decay=0.9)
    with pytest.raises(polyak.ConfigError, match=r"a config with the options every: give config\.strategy"):
        polyak.AveragerConfig(strategy=config)


def test_every_way_and_a_whole_config_are_taken_together_by_a_bank():
    bank = polyak.bank(mlp(), OmegaConf.create({"a": "swa", "b": {"strategy": "ema", "every": 3}}))
    assert [(one.strategy.name, one.options.every) for one in bank.values()] == [("swa", 1), ("ema", 3)]
