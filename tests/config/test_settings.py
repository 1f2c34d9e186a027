"""Settings of every kind come back from files, states and copies, and cannot be changed."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from enum import Enum
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, computed_field

import polyak
from configs import Limited
from models import mlp
from polyak import AveragerConfig, ConfigError
from polyak.config import files
from polyak.registry import Registry
from polyak.testing import check_strategy


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
