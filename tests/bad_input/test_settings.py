"""Settings, options and config files that cannot be used: refused in words, before anything is made."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import polyak
from models import mlp

# Strategies and settings


def test_an_unknown_strategy_answers_with_the_nearest_name_and_the_known_ones():
    with pytest.raises(polyak.UnknownStrategyError) as caught:
        polyak.average(mlp(), "ema_v4")
    message = str(caught.value)
    assert "no strategy is called 'ema_v4'" in message
    assert re.search(r"Did you mean 'ema_v\d'\?", message)
    for name in ("ema", "ema_debiased", "ema_v1", "ema_v2", "ema_v3", "swa"):
        assert name in message
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_strategy_names_the_plugins_that_failed_and_why(tmp_path, monkeypatch):
    from importlib.metadata import EntryPoint

    from polyak.registry import Registry

    (tmp_path / "broken_plugin.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry([EntryPoint("broken", "broken_plugin", "polyak")], strict=False, disabled=frozenset())
    with pytest.raises(polyak.UnknownStrategyError) as caught:
        registry.resolve("wanted")
    assert "broken" in str(caught.value)
    assert "no_such_module_anywhere" in str(caught.value)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "high", None])
@pytest.mark.parametrize("strategy", ["ema", "ema_debiased", "ema_v1", "ema_v2", "ema_v3"])
def test_a_decay_outside_its_range_names_the_setting_and_what_was_got(strategy, decay):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), strategy, decay=decay)
    assert "strategy.decay" in str(caught.value)
    assert repr(decay) in str(caught.value)


def test_a_misspelt_setting_names_the_nearest_one():
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), "ema", decya=0.9)
    assert "strategy.decya" in str(caught.value)
    assert "Did you mean 'decay'?" in str(caught.value)


def test_a_misspelt_option_names_the_nearest_one():
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), "ema", stard=5)
    assert "Did you mean 'start'?" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, ["every", "0"]),
        ({"start": -1}, ["start", "-1"]),
        ({"origin": "last"}, ["origin", "'initial'", "'first'", "'last'"]),
        ({"buffers": "avarage"}, ["buffers", "avarage"]),
        ({"match": "shape"}, ["match", "'name'", "'order'", "'shape'"]),
        ({"kernel": "fast"}, ["kernel", "'foreach'", "'fast'"]),
        ({"nonfinite": "ignore"}, ["nonfinite", "'skip'", "'ignore'"]),
        ({"dtype": "float33"}, ["dtype", "float33", "float32"]),
        ({"dtype": torch.int64}, ["dtype", "int64", "float32"]),
        ({"device": "gpu"}, ["device", "gpu", "cpu"]),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_names_it_what_was_got_and_what_is_allowed(options, words):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), "ema", **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("strategy", [nn.Linear, None, 5, ["ema"]], ids=repr)
def test_what_is_no_strategy_is_refused_in_words(strategy):
    with pytest.raises(polyak.ConfigError, match="strategy"):
        polyak.average(mlp(), strategy)


def test_settings_beside_a_strategy_object_are_refused():
    with pytest.raises(polyak.ConfigError, match=r"'decay' .*set them on it"):
        polyak.average(mlp(), polyak.EMA(), decay=0.5)


@pytest.mark.parametrize("reserved", ["every", "start", "model", "dtype", "strategy"])
def test_a_strategy_may_not_define_a_reserved_setting(reserved):
    with pytest.raises(TypeError, match=f"'{reserved}'.*choose another name"):
        type("Bad", (polyak.Strategy,), {"__annotations__": {reserved: int}, reserved: 1, "rate": lambda s, c: 0.5})


# Config files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.toml", None, ["absent.toml", "cannot be read"]),
        ("broken.toml", "strategy = [", ["broken.toml", "not valid TOML"]),
        ("broken.json", "{", ["broken.json", "not valid JSON"]),
        ("broken.yaml", "a: [", ["broken.yaml", "not valid YAML"]),
        ("list.json", "[1]", ["list.json", "list", "strategy"]),
        ("empty.yaml", "", ["empty.yaml", "expected a table"]),
        ("average.ini", "", ["average.ini", "'.ini'", ".toml", ".yaml", ".json"]),
        ("average", "", ["(none)", ".toml"]),
        ("key.toml", "evry = 2\n", ["key.toml", "evry", "Did you mean 'every'?"]),
        ("value.toml", '[strategy]\nname = "ema"\ndecay = 2.0\n', ["strategy", "decay", "2.0"]),
        ("inner.yaml", "strategy: {name: ema, dekay: 0.5}", ["strategy", "dekay", "Did you mean 'decay'?"]),
        ("strategy.json", json.dumps({"strategy": "emma"}), ["no strategy is called 'emma'", "Did you mean"]),
        ("nameless.json", json.dumps({"strategy": {"decay": 0.5}}), ["strategy", "name"]),
    ],
)
def test_a_config_file_that_cannot_be_used_says_where_and_why(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.AveragerConfig.from_file(path)
    for word in words:
        assert word in str(caught.value)


def test_a_config_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "average.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(polyak.ConfigError, match="cannot be read"):
        polyak.AveragerConfig.from_file(path)


def test_every_wrong_part_is_said_at_once_also_beside_an_unknown_strategy():
    with pytest.raises(polyak.UnknownStrategyError, match=r"(?s)dtype: got 'int8'.*strategy: .*'emaa'"):
        polyak.average(mlp(), "emaa", dtype="int8")
    with pytest.raises(polyak.ConfigError, match=r"(?s)the average 'a' .*'emaa'.*the average 'b' .*decay"):
        polyak.bank(mlp(), {"a": "emaa", "b": {"name": "ema", "decay": 2}})


@pytest.mark.parametrize("settings", [{"decay": "0.999"}, {"every": "3"}, {"decay": "1e-3"}], ids=str)
def test_a_number_in_quotes_is_asked_for_without_them(settings):
    with pytest.raises(polyak.ConfigError, match=r"\(got '.*'\)\. Write it without quotes\."):
        polyak.average(mlp(), "ema", **settings)
