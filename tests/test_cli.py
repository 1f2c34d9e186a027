"""The command line: what it lists, that it stays whole when piped, and what it says when something is missing."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points

import jsonschema
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

import polyak
from polyak.__main__ import main
from polyak.cli.tables import Listing, list_strategies, show
from polyak.compat import STAND_INS
from polyak.registry import shared_registry
from scratch import distribute, environment, installed, offering

SETTINGS_OF_V3 = (
    "decay=0.9999, min_decay=0.0, update_after_step=0, use_warmup=False, warmup_gamma=1.0, "
    "warmup_power=0.6666666666666666, foreach=True, exclude_buffers=False, "
    "origin='initial', match='order'"
)


@pytest.fixture
def polyak_says(monkeypatch, capsys):
    """Return a function that runs the command and returns its exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "40")  # what is piped is not cut to it

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyak", *arguments])
        shared_registry.cache_clear()
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
        else:
            status = 0
        return (status, *capsys.readouterr())

    yield run
    shared_registry.cache_clear()


@pytest.fixture
def site(tmp_path):
    with installed(tmp_path) as site:
        yield site


def rows(printed: str) -> dict[str, list[str]]:
    """Return the cells of a piped table by its first column."""
    cells = [re.split(r" {2,}", line) for line in printed.splitlines()]
    return {first: others for first, *others in cells}


def test_strategies_are_listed_with_distribution_source_and_all_settings(polyak_says):
    status, out, err = polyak_says("strategies")
    assert (status, err) == (0, "")
    table = rows(out)
    assert table.pop("strategy") == ["offered by", "source", "settings"]
    assert list(table) == list(polyak.strategies())
    assert table["ema_v3"] == [
        "polyak",
        "timm 1.0.31, ModelEmaV3",
        SETTINGS_OF_V3,
    ]
    assert table["swa"] == ["polyak", "Izmailov et al. 2018, arXiv:1803.05407", "origin='first'"]
    assert table["byol"][0] == "polyak-byol"
    assert table["byol"][2] == "decay=0.996, steps=100000, origin='initial'"
    assert table["lr_weighted"] == [
        "polyak-lr-weighted",
        "Defazio et al. 2024, arXiv:2405.15682",
        "power=2.0, origin='first'",
    ]


def test_the_listed_settings_are_those_that_average_uses(polyak_says):
    for name, (*_, settings) in rows(polyak_says("strategies")[1]).items():
        if name == "strategy" or "(required)" in settings:
            continue
        averager = polyak.average({"w": torch.zeros(1)}, name)
        used = {**averager.options.model_dump(), **averager.strategy.model_dump()}
        listed = dict(part.split("=", 1) for part in settings.split(", "))
        assert {key: repr(used[key]) for key in listed} == listed
        assert {*type(averager.strategy).model_fields} - {"name"} < {*listed}
        assert "origin" in listed


MISTAKES = [
    ["schema", "-o", "/no/such/x.json"],
    ["snapshots", "/no/such"],
    ["plan", "--params", "x"],
    ["plan", "--params", "1e9", "--ranks", "0"],
    ["profile", "emma", "--steps", "100"],
    ["profile", "ema", "decay=2", "--steps", "100"],
    ["profile", "ema", "--steps", "x"],
    ["profile", "ema", "momentum=0.1", "--steps", "100"],
    ["convert", "ema", "--steps", "0"],
    ["convert", "ema", "--steps", "100", "--to", "emma"],
    ["sweep", "/no/such"],
    ["synthesize", "/no/such", "ema"],
    ["no-such-command"],
]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_exits_with_2_and_words_whichever_the_command(words, polyak_says):
    status, _, err = polyak_says(*words)
    assert status == 2
    assert err
    assert "Traceback" not in err
    assert ".tmp" not in err


def test_every_strategy_names_its_source():
    assert [name for name, cls in polyak.strategies().items() if not cls.source] == []


def test_what_is_piped_has_one_whole_line_for_each_row_and_no_escapes(polyak_says):
    out = polyak_says("strategies")[1]
    assert len(out.splitlines()) == 1 + len(polyak.strategies())
    assert "\x1b" not in out
    assert "…" not in out
    assert [line for line in out.splitlines() if line != line.rstrip()] == []


def on_a_terminal(width: int) -> list[str]:
    console = Console(width=width, force_terminal=True, no_color=True, file=io.StringIO())
    show(list_strategies(polyak.strategies()), console)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [100, 120, 200])
def test_on_a_terminal_a_table_fits_and_breaks_no_word(width):
    lines = on_a_terminal(width)
    assert max(map(cell_len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    assert set(SETTINGS_OF_V3.split()) | {"arXiv:1803.05407", "polyak-lr-weighted"} <= words


def test_a_terminal_that_is_too_narrow_gets_whole_lines():
    assert any(line.endswith(SETTINGS_OF_V3) for line in on_a_terminal(60))


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_in_a_message_are_shown_as_they_are(terminal):
    console = Console(width=80, force_terminal=terminal, no_color=True, file=io.StringIO())
    show(Listing(("plugin", "what"), [("mine", "expected [0, 1] or [red]")], wraps=1), console)
    assert "expected [0, 1] or [red]" in console.file.getvalue()


def test_plugins_are_listed_with_what_loaded_what_failed_and_why(site, polyak_says, monkeypatch):
    distribute(site, "acme-half", offering("half"), version="2.5", points="half = acme_half")
    distribute(site, "acme-ema", offering("ema", "Ours"))
    distribute(site, "acme-off", offering("off"))
    distribute(site, "breaks-import", "import nowhere_to_be_found  # [bold]", version="0.3")
    distribute(site, "breaks-markup", "raise ValueError('expected [0, 1] or [red]')")
    monkeypatch.setenv("POLYAK_DISABLE_PLUGINS", "acme-off")
    status, out, err = polyak_says("plugins")
    assert (status, err) == (0, "")
    first, table = out.splitlines()[0], rows(out)
    assert first.startswith(f"polyak {polyak.__version__}, Python {sys.version.split()[0]}, torch ")
    assert table["plugin"] == ["distribution", "version", "target", "state", "what"]
    assert table["byol"] == ["polyak-byol", "0.1.0", "polyak_byol", "loaded", "offers byol"]
    assert table["half"] == ["acme-half", "2.5", "acme_half", "loaded", "offers half"]
    assert table["acme-ema"][3:] == ["loaded", "offers acme-ema:ema"]
    assert table["acme-off"][3:] == ["disabled", "disabled by POLYAK_DISABLE_PLUGINS"]
    assert table["breaks-import"] == [
        "breaks-import", "0.3", "breaks_import", "failed", "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ]  # fmt: skip
    assert table["breaks-markup"][3:] == ["failed", "ValueError: expected [0, 1] or [red]"]


def test_without_plugins_it_says_so(polyak_says, monkeypatch):
    monkeypatch.setenv("POLYAK_DISABLE_PLUGINS", "polyak-byol,polyak-lr-weighted")
    assert rows(polyak_says("plugins")[1])["byol"][3] == "disabled"
    monkeypatch.setattr("polyak.registry.entry_points", lambda group: [])
    assert polyak_says("plugins")[1].splitlines()[1:] == ["No plugins are installed."]


def test_an_error_is_one_line_and_no_traceback(site, polyak_says, monkeypatch):
    distribute(site, "breaks-import", "import nowhere_to_be_found")
    monkeypatch.setenv("POLYAK_STRICT_PLUGINS", "1")
    status, out, err = polyak_says("plugins")
    assert status == 2
    assert out.count("\n") <= 1
    assert err.startswith("polyak: the plugin 'breaks-import' of breaks-import 1.0 cannot be used: ModuleNotFoundError")
    assert "Traceback" not in err


def test_the_schema_goes_to_standard_output_or_into_a_file(polyak_says, tmp_path):
    status, out, _ = polyak_says("schema")
    assert status == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(out))
    assert jsonschema.Draft202012Validator(json.loads(out)).is_valid({"strategy": {"name": "byol", "steps": 9}})
    assert polyak_says("schema", "-o", str(tmp_path / "a.json"))[:2] == (0, "")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == out
    status, _, err = polyak_says("schema", "--output", str(tmp_path / "absent" / "a.json"))
    assert status == 2
    assert re.fullmatch(r"polyak: the file '.*a\.json' cannot be written: there is no folder '.*absent'.*\n", err)


def test_the_version_is_the_packages(polyak_says):
    assert polyak_says("--version") == (0, f"polyak {polyak.__version__}\n", "")


def test_without_arguments_it_says_what_it_can_do(polyak_says):
    _, out, err = polyak_says()
    for command in ("strategies", "plugins", "schema"):
        assert command in out + err


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(absent, polyak_says, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("polyak.cli", "typer.", "rich."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    message = f"polyak: the command line needs {absent}: pip install rich typer\n"
    assert polyak_says("strategies") == (2, "", message)


def test_the_console_script_is_the_modules_command():
    (script,) = entry_points(group="console_scripts", name="polyak")
    assert script.load() is main


def test_a_broken_plugin_harms_neither_import_nor_command(site):
    distribute(site, "breaks-import", "import nowhere_to_be_found")
    distribute(site, "acme-half", offering("half"))
    code = """
import sys
import polyak, runpy, torch
assert not {"acme_half", "breaks_import", "typer", "rich"} & sys.modules.keys()
polyak.average(torch.nn.Linear(2, 1), "half").update()
sys.argv = ["polyak", "plugins"]
runpy.run_module("polyak", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(site),
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    assert rows(done.stdout)["breaks-import"][3:] == [
        "failed",
        "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ]
    assert rows(done.stdout)["acme-half"][3] == "loaded"
    assert done.stderr.count("the plugin 'breaks-import' of breaks-import 1.0 cannot be used") == 1


def test_the_stand_ins_are_listed_and_are_there(polyak_says):
    status, out, _ = polyak_says("compat")
    assert status == 0
    named = [f"polyak.compat.{one.module}.{name}" for one in STAND_INS for name in one.names]
    assert all(name in out for name in named)
    for name in named:
        module, _, cls = name.rpartition(".")
        if module.rpartition(".")[2] not in {"ignite", "lightning"}:  # which need the trainers
            assert isinstance(getattr(importlib.import_module(module), cls), type)
