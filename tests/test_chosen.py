"""Everything that takes a strategy takes every way to name one."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError
from torch import nn

import polyak
from models import mlp
from polyak import posthoc
from polyak.testing import check_strategy


@dataclass
class Settings:
    name: str = "ema"
    decay: float = 0.5


@dataclass
class Whole:
    strategy: Settings = field(default_factory=Settings)
    every: int = 2
    include: tuple[str, ...] = ("*.weight",)


PLAIN = {"name": "ema", "decay": 0.5}
ONLY = {
    "object": polyak.EMA(decay=0.5),
    "mapping": PLAIN,
    "namespace": Namespace(**PLAIN),
    "dataclass": Settings(),
    "omegaconf": OmegaConf.create(PLAIN),
    "config": polyak.AveragerConfig(strategy=PLAIN),
    "config of defaults": polyak.AveragerConfig(strategy=PLAIN, every=1),
    "namespace with strategy": Namespace(strategy=Namespace(**PLAIN), every=1, start=0),
    "mapping with strategy": {"strategy": PLAIN},
}
WHOLE = {
    "mapping": {"strategy": PLAIN, "every": 2, "include": ["*.weight"]},
    "namespace": Namespace(strategy=Namespace(**PLAIN), every=2, include=["*.weight"]),
    "dataclass": Whole(),
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


class Train(BaseModel):
    average: polyak.AveragerConfig = polyak.AveragerConfig()


ALONE = {**ONLY, "name": "ema", "class": polyak.EMA}


@pytest.mark.parametrize("way", ALONE.values(), ids=ALONE)
def test_a_config_is_made_of_a_strategy_alone(way):
    wanted = polyak.AveragerConfig(strategy=polyak.AveragerConfig(strategy=way).strategy)
    assert polyak.AveragerConfig.of(way) == wanted
    assert Train(average=way).average == wanted
    assert Train.model_validate_json(Train(average=way).model_dump_json()).average == wanted


@pytest.mark.parametrize("way", WHOLE.values(), ids=WHOLE)
def test_a_config_is_made_of_a_strategy_and_options(way):
    wanted = polyak.AveragerConfig(strategy=PLAIN, every=2, include="*.weight")
    assert polyak.AveragerConfig.of(way) == wanted
    assert Train(average=way).average == wanted
    check_strategy(way)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "ema", "decay": 2}, r"strategy\.decay\n  Input should be less than 1"),
        ({"name": "ema", "every": 2}, r"strategy\.every"),
        ({"decay": 0.5}, r"decay\n  Extra inputs"),
        ("emma", r"strategy\n  .*Did you mean 'ema'"),
        (3, "average\n  Input should be a valid dictionary"),
        (nn.Linear, "average\n  Input should be a valid dictionary"),
    ],
)
def test_what_is_neither_is_refused_with_its_place(wrong, said):
    with pytest.raises(ValidationError, match=said):
        Train(average=wrong)
    with pytest.raises(polyak.ConfigError):
        polyak.AveragerConfig.of(wrong)


def test_settings_that_hold_themselves_are_refused_in_words():
    for settings in ({}, Namespace()):
        table = settings if isinstance(settings, dict) else vars(settings)
        table["strategy"] = settings
        for take in (polyak.AveragerConfig.of, check_strategy, lambda way: polyak.average(mlp(), way)):
            with pytest.raises(polyak.ConfigError, match="too many values within one another"):
                take(settings)


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


def test_a_target_is_a_class_with_its_settings(tmp_path):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.5)
    with posthoc.Recorder(averager, tmp_path, every=4):
        for _ in range(8):
            with torch.no_grad():
                model[0].weight.add_(1)
            averager.update()
    made = posthoc.synthesize(tmp_path, polyak.EMA, decay=0.5, start=0)
    assert torch.equal(made.state_dict["0.weight"], averager.averages["0.weight"])
    assert [row.label for row in posthoc.sweep(tmp_path, lambda state: 0.0, [polyak.SWA]).rows] == ["swa"]


def test_what_a_config_says_is_not_said_again():
    config = polyak.AveragerConfig(strategy=PLAIN, every=2)
    with pytest.raises(polyak.ConfigError, match="'every' given in the config, too"):
        polyak.average(mlp(), config, every=5)
    with pytest.raises(polyak.ConfigError, match="It is a setting of the strategy"):
        polyak.average(mlp(), config, decay=0.9)
    for way in (config, Namespace(strategy="ema", every=2, start=0), {"strategy": PLAIN, "every": 2}):
        for take in (lambda way: polyak.AveragerConfig(strategy=way), lambda way: polyak.convert(way, "swa", steps=9)):
            with pytest.raises(polyak.ConfigError, match=r"a config with the options every: give its strategy alone"):
                take(way)


def test_every_way_and_a_whole_config_are_taken_together_by_a_bank():
    bank = polyak.bank(mlp(), OmegaConf.create({"a": "swa", "b": {"strategy": "ema", "every": 3}}))
    assert [(one.strategy.name, one.options.every) for one in bank.values()] == [("swa", 1), ("ema", 3)]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["average.toml", "average.yaml", "average.yml", "average.json"])
def test_a_config_file_is_taken_by_its_path_or_its_name(name, kind, tmp_path):
    polyak.AveragerConfig(strategy=PLAIN, every=2).to_file(tmp_path / name)
    averager = polyak.average(mlp(), kind(tmp_path / name), include="*.weight")
    assert (averager.strategy, averager.options.every, averager.options.include) == (
        polyak.EMA(decay=0.5),
        2,
        ("*.weight",),
    )
    with pytest.raises(polyak.ConfigError, match=r"'every' given in the config, too"):
        polyak.average(mlp(), kind(tmp_path / name), every=3)
    with pytest.raises(polyak.MissingFileError, match=r"absent\.toml' cannot be read"):
        polyak.average(mlp(), kind("absent.toml"))
