"""The schema of a config agrees with what is loaded, and serves editors and models of the user's own."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

import polyak
from configs import CONFIGS, NEEDED, REFUSED, SUFFIXES, Limited
from models import mlp
from polyak import AveragerConfig, ConfigError
from polyak.registry import registry, shared_registry
from polyak.strategy import EMA
from scratch import distribute, installed, offering


@pytest.fixture(scope="module")
def schema():
    schema = AveragerConfig.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


@pytest.mark.parametrize("data", CONFIGS)
def test_the_schema_accepts_what_a_config_accepts_and_what_it_writes(data, schema, tmp_path):
    schema.validate(data)
    config = AveragerConfig.of(data)
    schema.validate(json.loads(config.model_dump_json()))
    config.to_file(tmp_path / "a.yaml")
    schema.validate(yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", [*sorted(polyak.strategies().keys() - NEEDED), "polyak:ema", "polyak-byol:byol"])
def test_the_schema_accepts_a_name_alone_and_with_its_distribution(name, schema):
    schema.validate({"strategy": name})
    schema.validate({"strategy": {"name": name}})
    assert AveragerConfig.of({"strategy": name}) == AveragerConfig.of({"strategy": {"name": name}})


@pytest.mark.parametrize("data", [data for data, _ in REFUSED], ids=str)
def test_the_schema_refuses_what_a_config_refuses(data, schema):
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(data)


VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, 1.0, 1.5, -0.0, 1e3, 1e300, 10**20, 2**63, 200, "", "ema", "auto", "0.5", "1",
    "copy", "cpu", "cuda:0", "cuda:01", "cuda:128", "float32", "torch.half", "int64", "first", [], ["a"], [1], {},
    {"a": "copy"}, {"a": 1},
]  # fmt: skip


UNITS = ("steps", "samples", "tokens", "epochs", "fraction", None)


NEEDS = ("batch_size", "tokens_per_step", "steps_per_epoch", "total_steps")


def _disagreements(schema, configs):
    for data in configs:
        try:
            accepted = bool(AveragerConfig.of(data))
        except ConfigError:
            accepted = False
        if accepted != schema.is_valid(data):
            yield f"{data}: {'the schema' if accepted else 'the loader'} refuses it"


@pytest.mark.parametrize("option", [*AveragerConfig.model_fields, "unknown"])
def test_the_schema_and_the_loader_agree_on_every_value_of_an_option(option, schema):
    assert [*_disagreements(schema, ({option: value} for value in VALUES))] == []


@pytest.mark.parametrize("name", polyak.strategies())
def test_the_schema_and_the_loader_agree_on_every_value_of_a_setting(name, schema):
    strategy = {"name": name, **NEEDED.get(name, {})}
    fields = polyak.strategies()[name].model_fields
    configs = [{"strategy": {**strategy, field: value}} for field in fields for value in VALUES]
    assert [*_disagreements(schema, configs)] == []


def test_the_schema_and_the_loader_agree_on_settings_that_depend_on_each_other(schema):
    lives = [
        {"strategy": {"name": "ema_halflife", "halflife": 3, "unit": unit, one: 3, other: value}}
        for unit in UNITS
        for one in NEEDS
        for other in NEEDS
        for value in (None, 5, 0)
    ]
    numbers = (None, 0.1, 0, -1, "x")
    widths = [{"strategy": {"name": "power", "gamma": a, "sigma_rel": b}} for a in numbers for b in numbers]
    assert [*_disagreements(schema, lives + widths)] == []


def test_a_config_inside_a_model_of_the_users_own_has_the_same_schema_and_comes_back():
    class Train(BaseModel):
        lr: float = 0.1
        ema: AveragerConfig = AveragerConfig()
        more: dict[str, AveragerConfig] = {}
        short: EMA = EMA(decay=0.9)

    schema = jsonschema.Draft202012Validator(Train.model_json_schema())
    train = Train(ema={"strategy": {"name": "power", "gamma": 3}}, more={"a": {"strategy": "swa"}})
    assert Train.model_validate_json(train.model_dump_json()) == train
    assert Train.model_validate(train.model_dump()) == train
    assert schema.is_valid(json.loads(train.model_dump_json()))
    assert schema.is_valid({"short": {"decay": 0.5}})
    for right in ("swa", {"name": "ema", "decay": 0.5}):
        for data in ({"ema": right}, {"more": {"a": right}}):
            assert schema.is_valid(data)
            assert Train.model_validate(data)
    for wrong in (
        {"name": "ema", "decy": 1}, {"decay": 0.5}, {"name": "ema", "decay": "0.5"}, "emma",
        {"name": "ema", "every": 2},
    ):  # fmt: skip
        for data in ({"ema": {"strategy": wrong}}, {"ema": wrong}, {"more": {"a": wrong}}):
            assert not schema.is_valid(data)
            with pytest.raises(ValidationError):
                Train.model_validate(data)
    written = jsonschema.Draft202012Validator(Train.model_json_schema(mode="serialization"))
    assert written.is_valid(json.loads(train.model_dump_json()))


def test_a_strategy_inside_a_model_of_the_users_own_is_an_object():
    class Train(BaseModel):
        strategy: polyak.Strategy = polyak.EMA()

    assert Train(strategy=polyak.SWA()).strategy == polyak.SWA()
    for wrong in ({"name": "ema"}, "ema", None):
        with pytest.raises(ValidationError, match=r"strategy\n.*expected an object of a subclass of Strategy"):
            Train(strategy=wrong)
    assert Train.model_json_schema()["properties"]["strategy"]["default"] == {"name": "ema", "decay": 0.999}


class WithRun(AveragerConfig):
    run: str = "first"


def test_a_config_with_a_field_of_the_users_own_builds_and_comes_back(tmp_path):
    config = WithRun(strategy="swa", every=2, run="second")
    assert config.build(mlp()).options.every == 2
    config.to_file(tmp_path / "a.toml")
    assert WithRun.from_file(tmp_path / "a.toml") == config
    assert WithRun.of("swa") == WithRun(strategy="swa")
    assert "run" in WithRun.model_json_schema()["properties"]


def test_an_infinite_setting_comes_back_from_json_and_from_every_file(tmp_path):
    class Offers:
        @polyak.hookimpl
        def polyak_strategies(self):
            return [Limited]

    shared_registry.cache_clear()
    registry().register(Offers(), "in-this-test")
    try:
        for limit in (math.inf, -math.inf):
            config = AveragerConfig(strategy=Limited(limit=limit))
            assert AveragerConfig.model_validate_json(config.model_dump_json()) == config
            for suffix in SUFFIXES:
                config.to_file(tmp_path / f"a.{suffix}")
                assert AveragerConfig.from_file(tmp_path / f"a.{suffix}") == config
    finally:
        shared_registry.cache_clear()


@pytest.mark.parametrize(
    "text", ["1e-3", "010", "yes", "1:30", "0o7", "~", "é", "<<", "", "2020-01-01", "a: b", ".inf"]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_that_looks_like_something_else_comes_back_as_a_text(text, suffix, tmp_path):
    config = AveragerConfig(include=[text], buffers={text: "copy"})
    config.to_file(tmp_path / f"a.{suffix}")
    assert AveragerConfig.from_file(tmp_path / f"a.{suffix}") == config


def test_the_schema_tells_an_editor_what_each_setting_is(schema):
    (byol,) = [part for part in schema.schema["$defs"].values() if part.get("title") == "BYOL"]
    assert byol["properties"]["steps"]["description"].startswith("The length of the run")
    assert byol["properties"]["name"]["enum"] == ["byol", "polyak-byol:byol"]
    assert byol["description"].startswith("A decay that rises along a cosine")
    assert "Example" not in byol["description"]
    assert [name for name, part in schema.schema["properties"].items() if "description" not in part] == ["$schema"]


def test_a_file_may_name_its_schema_for_editors(tmp_path, schema):
    data = {"$schema": "polyak.schema.json", "strategy": "swa"}
    schema.validate(data)
    (tmp_path / "a.json").write_text(json.dumps(data), encoding="utf-8")
    assert AveragerConfig.from_file(tmp_path / "a.json") == AveragerConfig(strategy="swa")


def test_the_schema_keeps_apart_what_two_plugins_call_the_same(tmp_path):
    distribute(tmp_path, "acme-one", offering("half").replace("power: float", "power: int"))
    distribute(tmp_path, "acme-two", offering("half"))
    distribute(tmp_path, "acme-three", offering("other").replace("power: float = 0.5", "power: float"))
    with installed(tmp_path):
        schema = jsonschema.Draft202012Validator(AveragerConfig.model_json_schema())
    accepted = [{"name": "acme-one:half", "power": 2}, {"name": "acme-two:half", "power": 0.5}, "acme-two:half"]
    refused = [{"name": "acme-one:half", "power": 0.5}, {"name": "half"}, "half", "other", {"name": "other"}]
    assert [value for value in accepted if not schema.is_valid({"strategy": value})] == []
    assert [value for value in refused if schema.is_valid({"strategy": value})] == []
    assert schema.is_valid({"strategy": {"name": "other", "power": 1.0}})


def test_the_schema_knows_the_plugins_that_are_there_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYAK_DISABLE_PLUGINS", "polyak-byol")
    with installed(tmp_path):
        schema = jsonschema.Draft202012Validator(AveragerConfig.model_json_schema())
    assert schema.is_valid({"strategy": "lr_weighted"})
    assert not schema.is_valid({"strategy": "byol"})
