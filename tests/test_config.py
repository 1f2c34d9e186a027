"""Configs: the same from every kind of file, refused in words that name the place, and described by a JSON schema."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import stat
import sys
from enum import Enum
from typing import Any, Generic, Literal, TypeVar

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, computed_field

import polyak
from models import mlp
from polyak import AveragerConfig, ConfigError
from polyak.config import files
from polyak.registry import Registry, registry, shared_registry
from polyak.strategy import EMA
from polyak.testing import check_strategy
from scratch import distribute, installed, offering

SUFFIXES = ["toml", "yaml", "yml", "json"]
# Beside the defaults: something else in every setting and option that there is.
OTHER = {
    "ema": {"decay": 0.5},
    "ema_debiased": {"decay": 1e-7},
    "ema_v1": {"decay": 0.0},
    "ema_v2": {"decay": 0.9999999},
    "ema_v3": {
        "decay": 0.9, "min_decay": 0.1, "update_after_step": 7, "use_warmup": True, "warmup_gamma": 2.5,
        "warmup_power": 0.75, "foreach": False, "exclude_buffers": True,
    },
    "swa": {},
    "ema_halflife": {"halflife": 1.5, "unit": "samples", "batch_size": 3},
    "ema_tf": {"decay": 0.9, "follow": 1},
    "polynomial": {"eta": 1e-9},
    "power": {"gamma": 3.25},
    "tail": {"fraction": 0.1, "total_steps": 1000},
    "lawa": {"window": 3},
    "dema": {"decay": 1e-7},
    "block_mean": {"length": 7},
    "byol": {"decay": 0.99, "steps": 3},
    "lr_weighted": {"power": 1.5},
}  # fmt: skip
NEEDED = {"ema_halflife": {"halflife": 300}, "block_mean": {"length": 5}}  # settings without a default
OPTIONS = {
    "start": 100,
    "every": 10,
    "origin": "first",
    "buffers": {"*.running_*": "copy", "norm.*": "skip"},
    "include": ["*"],
    "exclude": ["head.*", "émbedding.*"],
    "match": "order",
    "device": "cpu",
    "dtype": "float64",
    "nonfinite": "raise",
    "kernel": "loop",
}
CONFIGS = [
    pytest.param({"strategy": {"name": name, **settings}, **options}, id=f"{name}-{len(settings)}-{len(options)}")
    for name in polyak.strategies()
    for settings, options in ((NEEDED.get(name, {}), {}), (OTHER.get(name, {}), OPTIONS))
]


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


REFUSED = [
    ({"strategy": {"name": "ema", "decay": 1.0}}, r"strategy\.decay: Input should be less than 1 \(got 1\.0\)"),
    ({"strategy": {"name": "ema", "decay": -0.1}}, r"strategy\.decay: .* greater than or equal to 0 \(got -0\.1\)"),
    (
        {"strategy": {"name": "ema", "decay": "much"}},
        r"strategy\.decay: Input should be a valid number.* \(got 'm",
    ),
    (
        {"strategy": {"name": "ema", "decya": 0.5}},
        r"strategy\.decya: there is no such setting \(got 0\.5\)\. Did you mean 'decay'\? Known: decay, name\.",
    ),
    ({"strategy": {"name": "ema", "evry": 5}}, r"strategy\.evry: there is no .* Did you mean 'every'\?"),
    (
        {"evry": 5},
        r"evry: there is no such setting \(got 5\)\. Did you mean 'every'\? Known: buffers, capturable, device, ",
    ),
    (
        {"strategy": "ema", "decay": 0.5},
        r"decay: there is no such setting \(got 0\.5\)\. It is a setting of the strategy: .* inside 'strategy'",
    ),
    ({"strategy": {"decay": 0.5}}, r"strategy: a strategy is a name, a mapping .* got \{'decay': 0\.5\}"),
    ({"strategy": {"name": 3}}, r"strategy: a strategy is a name, .* got \{'name': 3\}"),
    ({"strategy": 3}, r"strategy: a strategy is a name, .* got 3"),
    ({"every": 0}, r"every: Input should be greater than 0 \(got 0\)"),
    ({"start": -1}, r"start: .* greater than or equal to 0 \(got -1\)"),
    ({"origin": "inital"}, r"origin: Input should be 'initial' or 'first' \(got 'inital'\)\. Did you mean 'initial'\?"),
    ({"kernel": "faster"}, r"kernel: Input should be 'auto', 'loop', 'foreach' or 'fused' \(got 'faster'\)"),
    ({"buffers": {"*": "avrage"}}, r"buffers\.\*: .* \(got 'avrage'\)\. Did you mean 'average'\?"),
    ({"dtype": "float3"}, r"dtype: got 'float3'; expected .*'float32'"),
    ({"device": "gpu"}, r"device: got 'gpu'; expected .* 'cuda:0'"),
    ({"exclude": ["a", 3]}, r"exclude\.1: Input should be a valid string \(got 3\)"),
    ({"strategy": "emma"}, r"strategy: no strategy is called 'emma'\. Did you mean 'ema'\? Known: ema, "),
]


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


class Limited(polyak.Strategy):
    name: Literal["limited"] = "limited"
    limit: float = 10.0

    def rate(self, clock):
        return 1 / min(clock.n, self.limit)


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


class Levels(polyak.Strategy):
    decay: float = 0.9

    def rate(self, clock):
        return 1 - self.decay


class Kind(Enum):
    LOW = "low"
    HIGH = "high"


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True)

    cap: float = math.inf


_T = TypeVar("_T")


class WithEnum(Levels):
    name: Literal["with_enum"] = "with_enum"
    kind: Kind = Kind.LOW


class WithComputed(Levels):
    name: Literal["with_computed"] = "with_computed"

    @computed_field
    @property
    def twice(self) -> float:
        return 2 * self.decay


class WithAlias(Levels):
    name: Literal["with_alias"] = "with_alias"
    window: int = Field(5, alias="win")


class WithSerialisedAlias(Levels):
    name: Literal["with_serialised_alias"] = "with_serialised_alias"
    window: int = Field(5, serialization_alias="win")


class WithPrivate(Levels):
    name: Literal["with_private"] = "with_private"
    scale: float = 1.0
    _twice: float = PrivateAttr()

    def model_post_init(self, _):
        self._twice = 2 * self.scale


class WithInner(Levels):
    name: Literal["with_inner"] = "with_inner"
    inner: Inner = Inner()


class WithType(Levels, Generic[_T]):
    name: Literal["with_type"] = "with_type"
    value: _T


class WithContainers(Levels):
    name: Literal["with_containers"] = "with_containers"
    several: tuple[float, ...] = (1.0, 2.0)
    some: frozenset[int] = frozenset({1, 2})
    table: dict[str, float] = Field({"a": 1.0})


class WithKeys(Levels):
    name: Literal["with_keys"] = "with_keys"
    steps: dict[int, float] = Field({1: 0.5, 10: 0.25})
    nested: dict[str, dict[float, list[int]]] = Field({"a": {0.5: [2]}})
    flags: dict[bool, int] | None = None


class WithExcluded(Levels):
    name: Literal["with_excluded"] = "with_excluded"
    secret: int = Field(3, exclude=True)


class WithBytes(Levels):
    name: Literal["with_bytes"] = "with_bytes"
    raw: bytes = b"\xff"


class WithAnything(Levels):
    name: Literal["with_anything"] = "with_anything"
    what: Any = None


WithInt = WithType[int]
COMES_BACK = [
    WithEnum(kind=Kind.HIGH), WithComputed(decay=0.5), WithAlias(win=7), WithSerialisedAlias(window=7),
    WithPrivate(scale=2.0), WithInner(inner=Inner(cap=2.0)), WithInner(), WithInt(value=3),
    WithContainers(several=(3.0,), table={"b": 2.0}), WithKeys(), WithKeys(steps={np.int64(3): 1.0}, flags={True: 1}),
]  # fmt: skip
REFUSED = [WithExcluded(secret=4), WithBytes(), WithAnything(what=torch.nn.ReLU)]


@pytest.fixture
def _fields_of_every_kind(monkeypatch):
    class Plugin:
        @polyak.hookimpl
        def polyak_strategies(self):
            return [*{type(strategy) for strategy in (*COMES_BACK, *REFUSED)}]

    names = Registry()
    names.register(Plugin(), "fields")
    for module in ("polyak.config", "polyak.config.explain", "polyak.registry"):
        monkeypatch.setattr(sys.modules[module], "registry", lambda: names)


@pytest.mark.usefixtures("_fields_of_every_kind")
@pytest.mark.parametrize("strategy", COMES_BACK, ids=repr)
def test_settings_of_every_kind_come_back_from_files_states_and_copies(strategy, tmp_path):
    config = AveragerConfig(strategy=strategy, every=2, buffers={"*": "copy"})
    for suffix in ("json", "yaml", "toml"):
        config.to_file(tmp_path / f"a.{suffix}")
        assert AveragerConfig.from_file(tmp_path / f"a.{suffix}") == config
    first, second = polyak.average(mlp(), strategy), polyak.average(mlp(), strategy)
    first.update()
    second.load_state_dict(first.state_dict())
    assert second.strategy == strategy
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.model_copy(deep=True)):
        assert again == config
        assert hash(again) == hash(config)
    check_strategy(strategy)


def test_keys_that_are_numbers_are_texts_in_files_and_nothing_else():
    assert WithKeys(steps={"1": 0.5, 10: 0.25}) == WithKeys()
    for key in ("1.5", "one", True, np.bool_(1), None):
        with pytest.raises(ConfigError, match="steps"):
            WithKeys(steps={key: 0.5})
    with pytest.raises(ConfigError, match=r"steps\.1: Input should be a valid number \(got '0\.5'\)"):
        WithKeys(steps={1: "0.5"})


@pytest.mark.usefixtures("_fields_of_every_kind")
def test_keys_that_are_numbers_come_back_when_they_were_changed_in_a_run():
    averager, again = polyak.average(mlp(), WithKeys()), polyak.average(mlp(), WithKeys())
    averager.update()
    averager.configure(steps={3: 0.5})
    again.load_state_dict(averager.state_dict())
    assert again.strategy == averager.strategy == WithKeys(steps={3: 0.5})


class WithNulls(Levels):
    name: Literal["with_nulls"] = "with_nulls"
    caps: dict[str, list[float | None]] = Field({"a": [1.0, None]})


def test_toml_refuses_a_null_however_deep():
    config = AveragerConfig(strategy=WithNulls())
    with pytest.raises(ConfigError, match=r"TOML has no null, and the strategy has caps\.a\.1 = None"):
        files.render("a.toml", config.model_dump(mode="json"))


@pytest.mark.usefixtures("_fields_of_every_kind")
@pytest.mark.parametrize("strategy", REFUSED, ids=repr)
def test_settings_that_cannot_be_saved_are_refused_before_anything_is_written(strategy, tmp_path):
    with pytest.raises(polyak.ConfigError, match=r"cannot be saved|excludes 'secret'"):
        AveragerConfig(strategy=strategy).to_file(tmp_path / "a.yaml")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(polyak.ConfigError, match=r"cannot be saved|excludes 'secret'"):
        polyak.average(mlp(), strategy)
    with pytest.raises(AssertionError, match=r"cannot be saved|excludes 'secret'"):
        check_strategy(strategy)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(b="skip"), lambda table: table.pop("*"), lambda table: table.clear(),
        lambda table: table.__setitem__("b", "skip"), lambda table: table.__delitem__("*"),
        lambda table: table.popitem(), lambda table: table.setdefault("b", "skip"),
        lambda table: table.__ior__({"b": "skip"}),
    ],
)  # fmt: skip
def test_a_mapping_of_a_config_cannot_be_changed(change):
    config = AveragerConfig(buffers={"*": "copy"})
    with pytest.raises(polyak.FrozenError, match="settings are frozen"):
        change(config.buffers)
    assert config == AveragerConfig(buffers={"*": "copy"})


class Nested(Levels):
    name: Literal["nested"] = "nested"
    table: dict[str, list[dict[str, float]]] = Field({"a": [{"b": 1.0}]})
    pairs: tuple[list[int], ...] = ([1, 2],)
    some: set[int] = Field({1, 2})


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.table["a"][0].update(b=2.0), lambda s: s.table["a"].append({}), lambda s: s.table.clear(),
        lambda s: s.pairs[0].sort(), lambda s: s.pairs[0].__setitem__(0, 3), lambda s: s.pairs[0].__iadd__([1]),
        lambda s: s.some.add(3), lambda s: s.some.__ior__({3}),
    ],
)  # fmt: skip
def test_what_a_setting_holds_cannot_be_changed_however_deep(change):
    strategy = Nested()
    with pytest.raises(polyak.FrozenError, match=r"settings are frozen, and a (dict|list|set) among them too"):
        change(strategy)
    assert strategy == Nested()
    for again in (pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy), Nested(**strategy.model_dump())):
        assert again == strategy
        assert hash(again) == hash(strategy)
        with pytest.raises(polyak.FrozenError):
            change(again)
    check_strategy(strategy)


def test_a_copy_with_other_settings_is_validated_and_frozen():
    config = AveragerConfig(strategy="swa", every=2)
    other = config.model_copy(update={"buffers": {"*": "copy"}, "start": torch.tensor(5)})
    assert other == AveragerConfig(strategy="swa", every=2, buffers={"*": "copy"}, start=5)
    assert other.model_fields_set == {"strategy", "every", "buffers", "start"}
    assert {other: 1}[other.model_copy(deep=True)] == 1
    for one in (other, config.model_copy(update={"buffers": {"*": "copy"}}, deep=True)):
        with pytest.raises(polyak.FrozenError):
            one.buffers["*"] = "skip"
    assert config.model_copy(update={"strategy": "ema"}).strategy == polyak.EMA()
    assert polyak.EMA(decay=0.5).model_copy() == polyak.EMA(decay=0.5)


@pytest.mark.parametrize(
    ("model", "update", "said"),
    [
        (AveragerConfig(), {"every": 0}, r"AveragerConfig\.model_copy\(\) cannot be used:\n  every: .* \(got 0\)"),
        (AveragerConfig(), {"evry": 2}, r"evry: there is no such setting \(got 2\)\. Did you mean 'every'"),
        (AveragerConfig(), {"strategy": "emma"}, r"no strategy is called 'emma'"),
        (polyak.EMA(), {"decay": 2}, r"EMA\.model_copy\(\) cannot be used:\n  decay: .* \(got 2\)"),
    ],
)
def test_a_copy_with_wrong_settings_is_refused(model, update, said):
    with pytest.raises(ConfigError, match=said):
        model.model_copy(update=update)


class WithPlaceholder(Levels):
    name: Literal["with_placeholder"] = "with_placeholder"
    cap: float = math.nan


@pytest.mark.parametrize(
    "make",
    [
        lambda: polyak.EMA(decay=math.nan), lambda: Limited(limit=math.nan),
        lambda: Limited(limit=torch.tensor(math.nan)),
        lambda: Nested(table={"a": [{"b": math.nan}]}), lambda: WithInner(inner=Inner(cap=math.nan)),
        lambda: WithAnything(what=(1, math.nan)), WithPlaceholder,
        lambda: Limited().model_copy(update={"limit": math.nan}),
        lambda: AveragerConfig.of({"strategy": {"name": "ema", "decay": math.nan}}),
        lambda: polyak.average(mlp(), Limited()).configure(limit=math.nan),
    ],
)  # fmt: skip
def test_a_setting_that_is_nan_is_refused(make):
    with pytest.raises(ConfigError, match=r"(decay|limit|table|inner|what|cap): .*\(?got nan"):
        make()


def test_equal_configs_have_equal_hashes():
    one = AveragerConfig(buffers={"a": "copy", "b": "skip"}, strategy=polyak.EMA(decay=0.5), include=["x", "y"])
    same = AveragerConfig(
        buffers={"b": "skip", "a": "copy"}, strategy={"name": "ema", "decay": 0.5}, include=("x", "y")
    )
    assert {one: 1}[same] == 1
    assert len({one, same, AveragerConfig(), polyak.EMA(), polyak.EMA(decay=0.5)}) == 4


@pytest.mark.parametrize("back", [False, True])
def test_a_state_of_a_subclass_that_kept_the_name_is_told_of(back):
    class Mine(polyak.EMA):
        def rate(self, clock):
            return super().rate(clock) / 2

    averagers = [polyak.average(mlp(), Mine(decay=0.9)), polyak.average(mlp(), "ema", decay=0.9)]
    saved, other = averagers[::-1] if back else averagers
    saved.update()
    names = [r"the class ema \(saved: '.*Mine'\)", r"the class .*Mine \(saved: 'ema'\)"]
    with pytest.warns(polyak.PolyakWarning, match=names[back]):
        other.load_state_dict(saved.state_dict())
    again = polyak.average(mlp(), saved.strategy)
    again.load_state_dict(saved.state_dict())
