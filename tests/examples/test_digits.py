"""The demo runs as it is: every strategy gets its row, the picture is one, and what cannot be used is said in words."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Literal

import matplotlib.image
import pytest

import polyak
from polyak import registry

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUICK = ["--seeds", "1", "--epochs", "1"]


@pytest.fixture
def demo(monkeypatch, capsys, tmp_path):
    """Return a function that runs the script as from the command line: its exit status and what it printed."""

    def run(*options):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["digits.py", *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return run


@pytest.fixture
def plugin():
    """Offer strategies as a plugin does, for one test."""

    def offer(*classes):
        class Plugin:
            @polyak.hookimpl
            def polyak_strategies(self):
                return list(classes)

        registry.registry().register(Plugin(), "plugin-of-a-test")

    registry.shared_registry.cache_clear()
    yield offer
    registry.shared_registry.cache_clear()


def rows(out, label):
    """Return the rows of a label, one from each table."""
    return [line.split() for line in out.splitlines() if line.startswith(f"{label} ")]


def test_every_installed_strategy_has_a_row_in_both_tables_and_the_picture_is_drawn(demo, tmp_path):
    status, out, err = demo(*QUICK)
    assert (status, err) == (0, "")
    assert {label: len(rows(out, label)) for label in ["raw weights", *polyak.strategies()]} == dict.fromkeys(
        ["raw weights", *polyak.strategies()], 2
    )
    assert "not run" not in out
    assert "failed" not in out
    pixels = matplotlib.image.imread(tmp_path / "demo.png")
    assert pixels.shape[0] > 500
    assert pixels[..., :3].std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_the_overview_is_a_second_smaller_picture(demo, tmp_path):
    status, _, _ = demo(*QUICK, "--strategy", "ema", "--overview", "overview.png")
    assert status == 0
    pixels = matplotlib.image.imread(tmp_path / "overview.png")
    assert pixels.shape[0] < matplotlib.image.imread(tmp_path / "demo.png").shape[0]
    assert pixels[..., :3].std() > 0.05


def test_one_strategy_can_be_chosen_and_its_settings_replace_those_of_the_demo(demo, tmp_path):
    options = ["--strategy", "ema_v3", "--set", "decay=0.5", "--set", "use_warmup=false", "--set", "every=2"]
    status, out, _ = demo(*QUICK, *options, "--out", "mine.svg")
    assert status == 0
    assert [row[:4] for row in rows(out, "ema_v3")] == [["ema_v3", "decay=0.5", "use_warmup=False", "every=2"]] * 2
    assert not rows(out, "swa")
    assert (tmp_path / "mine.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_config_files_are_averaged_as_they_are_and_beside_strategies(demo, tmp_path):
    (tmp_path / "late.toml").write_text('start = 30\n[strategy]\nname = "swa"\n', encoding="utf-8")
    status, out, _ = demo(*QUICK, "--config", "late.toml", "--strategy", "ema")
    assert status == 0
    assert [row[:2] for row in rows(out, "late.toml")] == [["late.toml", "start=30"]] * 2
    assert len(rows(out, "ema")) == 2


def test_an_average_that_keeps_nothing_has_the_figures_of_the_raw_weights(demo):
    _, out, _ = demo(*QUICK, "--strategy", "ema", "--set", "decay=0")
    for raw, ema in zip(rows(out, "raw weights"), rows(out, "ema"), strict=True):
        assert ema[2:4] == raw[4:6]
        assert ema[4:7] == ["+0", "%", "(0/1)"]


def test_an_average_that_is_worse_than_the_raw_weights_is_shown_to_be(demo):
    _, out, _ = demo(*QUICK, "--strategy", "ema", "--set", "decay=0.9999")
    for raw, ema in zip(rows(out, "raw weights"), rows(out, "ema"), strict=True):
        assert float(ema[2]) < float(raw[4])
        assert float(ema[3]) > 2 * float(raw[5])
        assert ema[4].startswith("+")
        assert ema[6] == "(0/1)"


def test_the_end_synthesises_the_average_that_was_really_kept_from_a_run_without_it(demo):
    _, out, _ = demo(*QUICK, "--strategy", "ema")
    raw = rows(out, "the last weights")[0][-3:]
    made, kept = (rows(out, f"best, {how}")[0][-3:] for how in ("synthesised", "really kept"))
    assert [float(loss) for loss in made[:2]] == pytest.approx([float(loss) for loss in kept[:2]], rel=1e-3)
    assert float(made[2]) < 1e-3
    assert float(kept[2]) == 0
    assert float(raw[2]) > 10 * float(made[2])
    assert "Σ|x| = 1.00" in out
    assert "199 of the 1198 digits" in out


class Asking(polyak.Strategy):
    """Needs what nobody can guess."""

    name: Literal["asking"] = "asking"
    moon: str

    def rate(self, clock):
        return 1.0


class Stumbling(polyak.Strategy):
    """Returns no rate after a while."""

    name: Literal["stumbling"] = "stumbling"

    def rate(self, clock):
        return 1.0 if clock.step < 7 else float("nan")


def test_a_plugin_whose_settings_cannot_be_guessed_or_that_fails_says_so_in_its_row(demo, plugin, monkeypatch):
    plugin(Asking, Stumbling)
    status, out, _ = demo(*QUICK)
    assert status == 0
    assert [row[1:3] for row in rows(out, "asking")] == [["not", "run,"]] * 2
    assert "strategy.moon" in out
    assert [row[1:5] for row in rows(out, "stumbling")] == [["failed", "at", "step", "7:"]] * 2
    assert len(rows(out, "ema")) == 2


WRONG = {
    "--strategy emo": "no strategy is called 'emo'. Did you mean 'ema'?",
    "--strategy ema --set deacy=0.9": "strategy.deacy: there is no such setting (got 0.9). Did you mean 'decay'?",
    "--strategy ema --set decay=2": "strategy.decay: Input should be less than 1 (got 2)",
    "--strategy ema --set decay": "--set decay: expected KEY=VALUE, such as --set decay=0.99",
    "--strategy ema --set name=swa": "--set name=swa: choose the strategy with --strategy swa",
    "--strategy ema --set exclude=moon": "the glob 'moon' matches none of the 14 tensor names",
    "--strategy ema --strategy ema": "'ema' was asked for twice",
    "--set decay=0.9": "--set decay=0.9: name the strategy that it is for, such as --strategy ema",
    "--config none.toml": "the config file 'none.toml' cannot be read",
    "--seeds 0": "--seeds 0: expected 1 or more",
    "--epochs -1": "--epochs -1: expected 1 or more",
    "--out no/demo.png": "--out no/demo.png: expected a file in a directory that exists",
    "--out demo.doc": "--out demo.doc: expected a file name that ends in one of",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_input_gets_a_message_and_status_2_before_any_training(options, demo, tmp_path):
    status, out, err = demo(*options.split())
    assert (status, out) == (2, "")
    assert err.startswith("digits.py: ")
    assert WRONG[options] in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
