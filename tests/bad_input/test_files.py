"""Hostile config files and impossible paths are refused in a few lines."""

from __future__ import annotations

import errno
import json
import os
from operator import attrgetter

import pytest
import torch

import polyak
from models import mlp
from refusals import averager_of

# Config files that are hostile, or written by habit: one answer in words, in bounded time


def _laughs(join):
    lines = ["a: &a {x: 1}"]
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True):
        lines.append(f"{new}: &{new} {join(', '.join([f'*{old}'] * 9))}")
    return "\n".join(lines)


HOSTILE = {
    "laughs.yaml": (_laughs("[{}]".format), "20,000 values"),
    "merges.yaml": (_laughs("{{<<: [{}]}}".format), "20,000 values"),
    "itself.yaml": ("strategy: &a [*a]", "an alias of what it stands in"),
    "deep.yaml": ("every: " + "[" * 10_000, "within one another"),
    "keys.yaml": ("? " * 10_000, "within one another"),
    "deep.json": ('{"every": ' * 20_000, "within one another"),
    "deep.toml": ("every = " + "[" * 40_000, "within one another"),
    "dotted.toml": (".".join(["a"] * 40_000) + " = 1", "too many parts (at line 1)"),
    "quoted.toml": ("x = 1\n[" + ".".join(['"a"'] * 40_000) + "]", "too many parts (at line 2)"),
    "digits.json": ('{"every": ' + "9" * 10_000 + "}", "digits"),
    "digits.yaml": ("every: " + "9" * 10_000, "digits"),
    "hexadecimal.toml": ("every = 0x" + "f" * 10_000, "<an integer of 40000 bits>"),
    "large.json": (" " * 300_000, "300,000 bytes; expected a config of at most 256 KiB"),
    "name.json": (json.dumps({"strategy": "x" * 200_000}), "no strategy is called 'xxx"),
    "key.toml": ("x" * 200_000 + " = 1", "there is no such setting"),
    "value.yaml": ("every: " + "x" * 100_000, "valid integer"),
    "many.json": (json.dumps({"buffers": {str(i): "no" for i in range(9000)}}), "more lines"),
    "tag.yaml": ("every: !<" + "a" * 100_000 + "> 3", "not valid YAML"),
    "object.yaml": ("every: !!python/object/apply:os.getpid []", "not valid YAML"),
    "set.yaml": ("include: !!set {a, b}", "not valid YAML"),
    "twice.yaml": ("every: 3\nstrategy: {name: ema, 'name': swa}", "the key 'name' is given twice"),
    "twice.json": ('{"every": 3, "start": 1, "every": 5}', "the key 'every' is given twice"),
    "twice.toml": ("every = 3\nevery = 5", "not valid TOML"),
    "number.yaml": ("1: 2", "Keys should be strings"),
    "schema.json": ('{"$schema": 3}', "$schema 3; expected a text"),
    "two.yaml": ("every: 3\n---\nevery: 5", "not valid YAML"),
}


def _briefly(message):
    return len(message.splitlines()) <= 10 and max(map(len, message.splitlines())) < 700


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_file_is_refused_in_ten_lines(name, tmp_path):
    text, words = HOSTILE[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.AveragerConfig.from_file(tmp_path / name)
    assert words in str(caught.value)
    assert _briefly(str(caught.value))


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "null"])
def test_what_is_no_regular_file_is_not_opened(kind, tmp_path):
    path = tmp_path / "average.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path = tmp_path / "a\0.toml"
    with pytest.raises(polyak.ConfigError, match="cannot be read: "):
        polyak.AveragerConfig.from_file(path)


def test_names_of_megabytes_are_not_printed():
    long = "x" * 2_000_000
    for call in (
        lambda: polyak.average(mlp(), long),
        lambda: polyak.average(mlp(), f"{long}:ema"),
        lambda: polyak.average(mlp(), {"name": "ema", long: 1}),
        lambda: polyak.average(mlp(), origin=long),
        lambda: polyak.average(mlp(), dtype=long),
        lambda: polyak.average(mlp(), device=long),
        lambda: polyak.average(mlp(), buffers={"*": long}),
        lambda: polyak.average(mlp(), include=long),
        lambda: polyak.bank(mlp(), {long: "emma"}),
        lambda: polyak.AveragerConfig.from_file(f"{long}.toml"),
        lambda: polyak.AveragerConfig.from_file(f"a.{long}"),
    ):
        with pytest.raises(polyak.ConfigError) as caught:
            call()
        assert _briefly(str(caught.value)), str(caught.value)[:200]


HABITUAL = [
    ("a.yaml", "strategy: {name: ema, decay: 1e-1}", ("strategy.decay", 0.1)),
    ("a.yaml", "start: 1e3", ("start", 1000)),
    ("a.toml", "start = 1e3", ("start", 1000)),
    ("a.json", '{"start": 1e3}', ("start", 1000)),
    ("a.yaml", "start: 010", ("start", 10)),
    ("a.yaml", "start: 0x10", ("start", 16)),
    ("a.toml", "\ufeffstart = 3", ("start", 3)),
    ("a.json", '\ufeff{"start": 3}', ("start", 3)),
    ("a.yaml", "\ufeffstart: 3", ("start", 3)),
    ("a.yaml", "strategy: &s {name: ema, decay: 0.5}", ("strategy.decay", 0.5)),
    ("a.yaml", "include: &i [0.*]\nexclude: *i", ("exclude", ("0.*",))),
    ("a.yaml", "buffers: {<<: {a: copy}, b: skip}", ("buffers", {"a": "copy", "b": "skip"})),
    ("a.yaml", "start: 1:30", None),
    ("a.yaml", "start: 1_000", None),
    ("a.yaml", "every: yes", None),
    ("a.yaml", "every: '3'", None),
    ("a.yaml", "strategy:\nevery: 3", None),
    ("a.json", '{"every": true}', None),
    ("a.json", '{"strategy": {"name": "ema", "decay": "0.999"}}', None),
    ("a.json", '{"strategy": {"name": "ema", "decay": false}}', None),
    ("a.json", '{"strategy": {"name": "ema_v3", "use_warmup": 1}}', None),
    ("a.json", '{"strategy": {"name": "ema", "decay": NaN}}', None),
    ("a.toml", 'strategy = {name = "ema", decay = inf}', None),
    ("a.toml", 'strategy = {name = "ema_v3", warmup_gamma = inf}', None),
]


@pytest.mark.parametrize(("name", "text", "wanted"), HABITUAL, ids=[text.strip("\ufeff") for _, text, _ in HABITUAL])
def test_what_people_write_by_habit_is_read_as_an_editor_reads_it_or_refused(name, text, wanted, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    if wanted is None:
        with pytest.raises(polyak.ConfigError, match="cannot be used"):
            polyak.AveragerConfig.from_file(tmp_path / name)
    else:
        config = polyak.AveragerConfig.from_file(tmp_path / name)
        assert attrgetter(wanted[0])(config) == wanted[1]


def test_a_file_in_a_folder_that_is_not_there_asks_for_the_folder(tmp_path):
    file = tmp_path / "none" / "average"
    for write in (
        lambda: polyak.save(averager_of(), file.with_suffix(".pt")),
        lambda: polyak.save(averager_of(), file.with_suffix(".safetensors")),
        lambda: polyak.AveragerConfig().to_file(file.with_suffix(".toml")),
    ):
        with pytest.raises(polyak.WriteError, match=r"there is no folder '.*none'; make it first") as caught:
            write()
        assert ".polyak-" not in str(caught.value)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "Make room"), (errno.EPERM, "Give another path")])
def test_room_is_asked_for_only_on_a_full_disk(tmp_path, monkeypatch, number, advice):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "scratch")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(polyak.WriteError, match=rf"{os.strerror(number)}\. {advice}"):
        polyak.save(averager_of(), tmp_path / "a.pt")
