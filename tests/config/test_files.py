"""Configs: the same from every kind of file, refused with the place and the reason."""

from __future__ import annotations

import json
import os
import stat
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

import polyak
from configs import CONFIGS, REFUSED, SUFFIXES
from polyak import AveragerConfig, ConfigError
from polyak.registry import registry, shared_registry
from polyak.strategy import EMA


class Optional(polyak.Strategy):
    name: Literal["optional"] = "optional"
    most: float | None = 0.5
    least: float | None = None

    def rate(self, clock):
        return 0.5


class Offering:
    @polyak.hookimpl
    def polyak_strategies(self):
        return [Optional]


@pytest.fixture
def optional():
    shared_registry.cache_clear()
    registry().register(Offering(), "in-this-test")
    yield
    shared_registry.cache_clear()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("data", CONFIGS)
def test_a_config_is_the_same_after_a_file_of_any_type(data, suffix, tmp_path):
    config = AveragerConfig.of(data)
    file = tmp_path / f"average.{suffix}"
    config.to_file(file)
    assert AveragerConfig.from_file(file) == config
    assert AveragerConfig.from_file(str(file)).strategy == config.strategy
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("data", CONFIGS)
def test_a_config_is_the_same_after_json_and_after_its_own_dump(data):
    config = AveragerConfig.of(data)
    assert AveragerConfig.model_validate_json(config.model_dump_json()) == config
    assert AveragerConfig.model_validate(config.model_dump()) == config
    assert AveragerConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_file_written_by_hand_builds_what_it_says(tmp_path):
    text = 'every = 3\ninclude = "w*"\n\n[strategy]\nname = "ema"\ndecay = 0.25\n'
    (tmp_path / "average.toml").write_text(text, encoding="utf-8")
    model = {"weight": torch.zeros(2), "bias": torch.zeros(2)}
    averager = AveragerConfig.from_file(tmp_path / "average.toml").build(model)
    model["weight"].fill_(1.0)
    for _ in range(3):
        averager.update()
    assert averager.averages["weight"].tolist() == [1 - 0.25**3] * 2
    assert "include" not in averager.averages


def test_the_short_forms_mean_the_long_ones():
    long = AveragerConfig.of({"strategy": {"name": "swa"}, "include": ["a.*"], "dtype": "float32", "device": "cpu"})
    short = AveragerConfig.of(
        {"strategy": "swa", "include": "a.*", "dtype": torch.float32, "device": torch.device("cpu")}
    )
    assert short == long
    assert AveragerConfig() == AveragerConfig.of({"strategy": EMA()})


def test_a_config_cannot_be_changed():
    config = AveragerConfig(strategy="ema")
    with pytest.raises(polyak.FrozenError, match="frozen"):
        config.every = 3
    with pytest.raises(polyak.FrozenError, match="frozen"):
        config.strategy.decay = 0.5


def test_pydantics_own_error_has_the_location_of_a_strategys_setting():
    with pytest.raises(ValidationError) as caught:
        AveragerConfig.model_validate({"strategy": {"name": "ema", "decay": 1.5}, "every": 0, "evry": 3})
    assert [error["loc"] for error in caught.value.errors()] == [("every",), ("strategy", "decay"), ("evry",)]


@pytest.mark.parametrize(("data", "said"), REFUSED, ids=[str(data) for data, _ in REFUSED])
def test_what_is_wrong_is_said_with_its_place_what_was_got_and_what_is_allowed(data, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        AveragerConfig.of(data)
    (tmp_path / "a.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        AveragerConfig.from_file(tmp_path / "a.json")
    assert str(caught.value).startswith(f"the config file '{tmp_path}/a.json' cannot be used:\n  ")


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        AveragerConfig.of({"every": 0, "strategy": {"name": "byol", "decay": 2, "stepz": 3}})
    assert str(caught.value).split("\n") == [
        "the settings cannot be used:",
        "  every: Input should be greater than 0 (got 0).",
        "  strategy.decay: Input should be less than 1 (got 2).",
        "  strategy.stepz: there is no such setting (got 3). Did you mean 'steps'? Known: decay, name, steps.",
    ]


FILES = [
    ("absent.toml", None, r"cannot be read: .*No such file"),
    ("folder.yaml", ..., r"cannot be read: .*folder"),
    ("binary.json", b"\xff\xfe\x00", r"cannot be read: .*utf-8"),
    ("broken.toml", b"strategy = \n", r"is not valid TOML: .*line 1"),
    ("broken.yaml", b"strategy: [", r"is not valid YAML: (.*\n)+.*line 1"),
    ("broken.json", b'{"strategy": ', r"is not valid JSON: .*line 1"),
    ("list.yaml", b"- ema", r"holds \['ema'\]; expected a table with 'strategy' and options"),
    ("text.yml", b"ema", r"holds 'ema'; expected a table"),
    ("number.json", b"3", r"holds 3; expected a table"),
    ("empty.yaml", b"", r"holds nothing; expected a table"),
    ("average.ini", b"", r"has the type '\.ini'; expected one of \.toml, \.yaml, \.yml, \.json"),
    ("average", b"", r"has the type '\(none\)'; expected one of"),
]


@pytest.mark.parametrize(("name", "content", "said"), FILES, ids=[name for name, *_ in FILES])
def test_a_file_that_is_no_config_is_refused_by_name_and_reason(name, content, said, tmp_path):
    file = tmp_path / name
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        AveragerConfig.from_file(file)
    assert str(caught.value).startswith(f"the config file {str(file)!r} ")


def test_a_file_keeps_what_it_held_when_it_cannot_be_written(tmp_path):
    file = tmp_path / "average.toml"
    AveragerConfig(strategy="swa").to_file(file)
    with pytest.raises(ConfigError, match=r"the config file '.*average\.ini' has the type '\.ini'"):
        AveragerConfig().to_file(tmp_path / "average.ini")
    with pytest.raises(polyak.WriteError, match=r"'.*toml' cannot be written: there is no folder .*; make it first"):
        AveragerConfig().to_file(tmp_path / "absent" / "average.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(polyak.WriteError, match="cannot be written"):
        AveragerConfig().to_file(tmp_path / "folder.toml")
    assert AveragerConfig.from_file(file).strategy.name == "swa"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["average.toml", "folder.toml"]


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    before = os.umask(0o022)
    try:
        AveragerConfig().to_file(tmp_path / "average.toml")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "average.toml").stat().st_mode) == 0o644


def test_a_subclass_that_kept_the_name_is_not_written_as_the_class_it_came_from(tmp_path):
    class Mine(EMA):
        def rate(self, clock):
            return super().rate(clock) / 2

    config = AveragerConfig(strategy=Mine(decay=0.9))
    with pytest.raises(ConfigError, match=r"Mine has the name 'ema' of another strategy"):
        config.to_file(tmp_path / "a.yaml")
    assert list(tmp_path.iterdir()) == []
    assert type(config.build({"w": torch.zeros(1)}).strategy) is Mine


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_null_that_is_no_default_is_written(optional, suffix, tmp_path):
    config = AveragerConfig(strategy=Optional(most=None))
    config.to_file(tmp_path / f"average.{suffix}")
    assert AveragerConfig.from_file(tmp_path / f"average.{suffix}") == config


def test_toml_refuses_the_null_that_it_cannot_write(optional, tmp_path):
    with pytest.raises(ConfigError, match=r"TOML has no null, and the strategy has most = None; write a \.yaml or"):
        AveragerConfig(strategy=Optional(most=None)).to_file(tmp_path / "average.toml")
    assert list(tmp_path.iterdir()) == []
    AveragerConfig(strategy=Optional(most=0.25)).to_file(tmp_path / "average.toml")
    assert AveragerConfig.from_file(tmp_path / "average.toml").strategy == Optional(most=0.25)


def test_a_strategy_that_nobody_offers_works_as_an_object():
    config = AveragerConfig(strategy=Optional(most=0.25), every=2)
    assert config.strategy == Optional(most=0.25)
    assert config.model_dump()["strategy"] == {"name": "optional", "most": 0.25, "least": None}
    averager = config.build({"w": torch.zeros(1)})
    averager.update()
    averager.update()
    assert averager.rate == 0.5
    with pytest.raises(polyak.UnknownStrategyError, match="no strategy is called 'optional'"):
        AveragerConfig.of(config.model_dump())
