"""States and files that are damaged or of something else are refused whole."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

import polyak
from models import Conv, mlp
from refusals import averager_of, refused, used


def _without(*keys):
    def cut(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return cut


def _set(value, *keys):
    def put(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return put


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_set(3, "format"), ["format 3", "upgrade polyak"]),
        (_set("1", "format"), ["expected what averager.state_dict() returned"]),
        (_without("format"), ["expected what averager.state_dict() returned"]),
        (_without("slots"), ["damaged or incomplete", "slots"]),
        (_without("slots", "average"), ["damaged or incomplete", "average"]),
        (_without("slots", "average", "2.bias"), ["another model", "missing: 2.bias"]),
        (_set(torch.ones(1), "slots", "average", "extra"), ["another model", "unknown: extra"]),
        (_set(torch.ones(1), "slots", "average", "2.bias"), ["reshaped: 2.bias is (1,), expected (2,)"]),
        (_set(torch.ones(2, dtype=torch.int64), "slots", "average", "2.bias"), ["retyped: 2.bias"]),
        (_set(torch.ones(2, dtype=torch.complex64), "slots", "average", "2.bias"), ["retyped: 2.bias"]),
        (_set([1.0, 2.0], "slots", "average", "2.bias"), ["damaged: 2.bias is list"]),
        (_without("progress"), ["damaged or incomplete", "progress"]),
        (_without("progress", "n"), ["damaged"]),
        (_set("x", "progress", "n"), ["damaged"]),
        (_set(1, "progress", "surprise"), ["damaged or incomplete", "surprise"]),
        (_without("history"), ["damaged or incomplete", "history"]),
        (_set((torch.ones(5),), "history"), ["damaged or incomplete"]),
        (_set((torch.ones(5), torch.ones(1), torch.ones(1)), "history"), ["damaged"]),
        (_set(7, "n"), ["damaged", "7"]),
        (_without("n"), ["damaged", "n"]),
        (_set(None, "skipped"), ["damaged or incomplete"]),
        (_without("strategy"), ["names no strategy"]),
        (_set({"decay": 0.5}, "strategy"), ["names no strategy"]),
        (_set({"name": "swa"}, "strategy"), ["made by the strategy 'swa'", "uses 'ema'"]),
        (_set((("cpu", torch.ones(3, dtype=torch.uint8)),), "generators"), ["damaged or incomplete"]),
        (_set((("nowhere", torch.ones(3, dtype=torch.uint8)),), "generators"), ["damaged or incomplete"]),
    ],
)
def test_a_damaged_state_is_refused_whole(damage, words):
    averager, other = used(mlp()), used(mlp(), steps=3)
    state = other.state_dict()
    damage(state)
    with refused(averager, polyak.StateError, *words):
        averager.load_state_dict(state)
    averager.update()


@pytest.mark.parametrize("state", [None, [], "state", {}, {"weight": torch.ones(1)}, 3], ids=str)
def test_what_is_no_state_is_refused(state):
    averager = used(mlp())
    with refused(averager, polyak.StateError, "expected what averager.state_dict() returned"):
        averager.load_state_dict(state)


def test_a_state_of_another_model_is_refused():
    averager = used(mlp())
    with refused(averager, polyak.StateError, "another model", "missing: 0.weight", "Nothing was loaded"):
        averager.load_state_dict(used(Conv()).state_dict())


def test_a_model_s_own_state_dict_is_refused():
    model = mlp()
    averager = used(model)
    with refused(averager, polyak.StateError, "0.bias"):
        averager.load_state_dict(model.state_dict())


@pytest.mark.parametrize("names", [("ema", "swa"), ("swa", "ema"), ("ema_v1", "ema_v2")], ids=str)
def test_a_state_of_another_strategy_is_refused_and_names_both(names):
    mine, theirs = (used(mlp(), name) for name in names)
    with refused(mine, polyak.StateError, repr(names[0]), repr(names[1]), f"strategy={names[1]!r}"):
        mine.load_state_dict(theirs.state_dict())


def test_a_state_with_other_settings_loads_with_a_warning():
    averager = used(mlp(), decay=0.9)
    with pytest.warns(polyak.PolyakWarning, match=r"decay=0.9 \(saved: 0.5\)"):
        averager.load_state_dict(used(mlp(), decay=0.5).state_dict())
    assert averager.strategy == polyak.EMA(decay=0.9)


def test_a_setting_that_a_plugin_renamed_is_told_when_a_state_is_loaded():
    def version(setting, default):
        body = {"__annotations__": {"name": Literal["odd"], setting: float}, "name": "odd", setting: default}
        return type("Odd", (polyak.Strategy,), {**body, "__module__": __name__, "rate": lambda self, clock: 0.5})

    old, new = version("power", 0.5), version("exponent", 0.9)
    averager = used(mlp(), new())
    with pytest.warns(polyak.PolyakWarning, match=r"no 'power' \(saved: 0.5\), exponent=0.9 \(not saved\)"):
        averager.load_state_dict(used(mlp(), old()).state_dict())


# Files that are something else


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_state_say_what_they_are_and_what_to_do(tmp_path, suffix):
    averager, file = averager_of(), tmp_path / f"average{suffix}"
    polyak.save(averager, file)
    file.write_bytes(file.read_bytes()[:60])
    with refused(averager, polyak.StateError, str(file), "damaged", "earlier file"):
        polyak.load(averager, file)


def test_a_pickled_model_is_refused_in_one_line(tmp_path):
    averager, file = averager_of(), tmp_path / "model.pt"
    torch.save(mlp(), file)
    with pytest.raises(polyak.StateError, match="holds a whole pickled object") as caught:
        polyak.load(averager, file)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: polyak.load(averager_of(), folder / "none.pt"),
        lambda folder: polyak.load(averager_of(), folder / "none.safetensors"),
        lambda folder: polyak.AveragerConfig.from_file(folder / "none.toml"),
        lambda folder: polyak.posthoc.synthesize(folder / "none", "swa"),
    ],
    ids=["state", "safetensors", "config", "snapshots"],
)
def test_a_missing_file_is_a_file_not_found_error(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="none") as caught:
        read(tmp_path)
    assert isinstance(caught.value, polyak.MissingFileError)
    assert isinstance(caught.value, polyak.StateError)
    assert isinstance(caught.value, polyak.ConfigError)


@pytest.mark.parametrize("read", ["load", "load_state_dict"])
def test_other_settings_than_the_saved_ones_are_warned_of_at_the_users_line(tmp_path, read):
    saved, other = averager_of(), polyak.average(mlp(), "ema", decay=0.5)
    polyak.save(saved, tmp_path / "a.pt")
    with pytest.warns(polyak.PolyakWarning, match=r"settings differ from the saved ones .*: decay=0\.5") as caught:
        polyak.load(other, tmp_path / "a.pt") if read == "load" else other.load_state_dict(saved.state_dict())
    assert [warning.filename for warning in caught] == [__file__]
