"""The page on plugins is followed to the letter: its files are built and installed beside polyak, its commands run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hatchling.build import build_wheel

import polyak
from polyak.registry import hookspecs
from polyak.strategy.base import RESERVED
from scratch import distribute, environment, installed

PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))
SHOWN = "\n".join(re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [tuple(block.strip().split("\n", 1)) for block in re.split(r"^\$ ", SHOWN, flags=re.MULTILINE)[1:]]

SHELL = """
import io, os, re, runpy, shlex, sys
from contextlib import redirect_stdout
import pytest
from polyak.__main__ import main
from polyak.registry import shared_registry, registry

for command in sys.argv[1:]:
    words, _, grep = command.partition(" | grep ")
    settings = [word.split("=") for word in shlex.split(words) if re.match("[A-Z_]+=", word)]
    sys.argv = shlex.split(words)[len(settings) :]
    os.environ.update(settings)
    shared_registry.cache_clear()
    out = io.StringIO()
    with redirect_stdout(out):
        match sys.argv:
            case ["python", "-m", "pytest", *arguments]:
                assert pytest.main([*arguments, "-p", "no:cacheprovider"]) == 0
            case ["python", script]:
                runpy.run_path(script, run_name="__main__")
            case ["polyak", *_]:
                try:
                    main()
                except SystemExit as done:
                    assert not done.code, done.code
    for name, _ in settings:
        del os.environ[name]
    sys.__stdout__.write("\f" + "".join(line for line in out.getvalue().splitlines(True) if grep in line))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of the page's files, with their distribution installed in its subfolder ``site``."""
    folder = tmp_path_factory.mktemp("polyak-root")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:  # what `pip install .` does, without a network
        wheel = build_wheel(str(folder))
    finally:
        os.chdir(before)
    zipfile.ZipFile(folder / wheel).extractall(folder / "site")
    return folder


@pytest.fixture(scope="module")
def printed(folder):
    """Return what each command prints; one process runs them all, because each would import torch anew."""
    commands = [command for command, *_ in COMMANDS[1:]]
    done = subprocess.run(
        [sys.executable, "-c", SHELL, *commands],
        cwd=folder, env=environment(folder / "site"), capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, done.stdout.split("\f")[1:], strict=True))


def test_the_page_shows_files_and_commands():
    assert FILES.keys() == {"polyak_root.py", "pyproject.toml", "try_root.py", "test_root.py", "polyak_progress.py"}
    assert COMMANDS[0] == ("pip install .",)
    assert len(COMMANDS) == 5


def test_the_module_has_as_many_lines_as_the_page_says():
    written = [line for line in FILES["polyak_root.py"].splitlines() if line.strip()]
    assert f"The module, {len(written)} lines" in PAGE
    assert len(written) <= 15


def test_the_page_names_every_field_of_the_clock_every_hook_and_every_reserved_setting():
    fields = [f"`{field.name}`" for field in dataclasses.fields(polyak.Clock)]
    hooks = [f"`{name}(" for name in hookspecs.__all__ if name.startswith("polyak_")]
    reserved = [f"`{name}`" for name in RESERVED]
    assert [word for word in (*fields, *hooks, *reserved) if word not in PAGE] == []


def test_the_wheel_holds_the_module_and_the_entry_point_alone(folder):
    (info,) = (folder / "site").glob("*.dist-info")
    assert (info / "entry_points.txt").read_text(encoding="utf-8").split() == ["[polyak]", "root", "=", "polyak_root"]
    assert [path.name for path in (folder / "site").iterdir() if path != info] == ["polyak_root.py"]


@pytest.mark.parametrize(("command", "shown"), COMMANDS[1:], ids=[command for command, *_ in COMMANDS[1:]])
def test_a_command_prints_what_the_page_shows(command, shown, printed):
    lines = iter([" ".join(line.split()) for line in printed[command].splitlines()])
    for line in shown.splitlines():
        expected = " ".join(line.split())
        # A line may go on after what is shown: pytest tells the time it took.
        assert any(got.startswith(expected) for got in lines), f"{line!r} is not printed by:\n{printed[command]}"


def test_the_plugin_that_only_watches_is_told_of_each_averaged_update(tmp_path, capsys):
    distribute(tmp_path, "polyak-progress", FILES["polyak_progress.py"], points="progress = polyak_progress")
    with installed(tmp_path):
        averager = polyak.average({"w": torch.zeros(1)}, "ema", decay=0.75, every=2)
        for _ in range(4):
            averager.update()
    assert capsys.readouterr().out == "update 1 at step 2: rate 0.438\nupdate 2 at step 4: rate 0.438\n"
