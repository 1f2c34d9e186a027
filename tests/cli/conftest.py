"""What the tests of the commands share: running one, and a recorded run."""

from __future__ import annotations

import sys

import pytest
import torch

import polyak
from polyak.__main__ import main

STEPS, EVERY = 200, 20
TASK = """
import torch

TRIED = []
TEXT = "no function"
TENSOR = torch.zeros(30, 30)

def far(state):
    TRIED.append(state)
    return (state["weight"] - 150.0).abs().mean()

def near(state):
    return -far(state)

def two(state, other):
    return 1.0

def words(state):
    return "good"

def breaks(state):
    raise KeyError("mine alone")
"""


@pytest.fixture
def says(monkeypatch, capsys, tmp_path):
    """Return a function that runs `polyak` beside a module `task`, and returns status, output and errors."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "unmet.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "wrong.py").write_text("import sys\nsys.nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # what typer says itself is one line there
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("task", "unmet", "wrong"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(command: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyak", *command.split()])
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
        else:
            status = 0
        return (status, *capsys.readouterr())

    return run


def record(folder, averager, model, **settings) -> None:
    """Record a run whose weights are the number of the step."""
    with polyak.posthoc.Recorder(averager, folder, **settings):
        for step in range(1, STEPS + 1):
            torch.nn.init.constant_(model.weight, step)
            averager.update()


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Record block means, and power averages alone in float32 and in float16, of one run each."""
    folder = tmp_path_factory.mktemp("recorded")
    model = torch.nn.Linear(3, 1, bias=False)
    record(folder / "blocks", polyak.average(model, "ema", decay=0.9), model, every=EVERY)
    powers = {name: {"name": "power", "sigma_rel": width} for name, width in (("short", 0.05), ("long", 0.1))}
    record(folder / "powers", polyak.bank(model, powers), model, every=EVERY)
    record(folder / "halves", polyak.bank(model, powers), model, every=EVERY, dtype="float16")
    return folder


@pytest.fixture
def stores(recorded, tmp_path):
    """Copy what was recorded beside the task, so that a test may harm it."""
    for folder in recorded.iterdir():
        (tmp_path / folder.name).mkdir()
        for file in folder.iterdir():
            (tmp_path / folder.name / file.name).write_bytes(file.read_bytes())
    return tmp_path
