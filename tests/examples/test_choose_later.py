"""The example of choosing afterwards runs as it is: what it prints agrees, and what it saves is the best average."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUICK = ["--steps", "60", "--every", "2", "--windows", "32"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def example(monkeypatch, capsys, tmp_path):
    """Return a function that runs the script as from the command line: its exit status and what it printed."""

    def run(*options):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["choose_later.py", *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / "choose_later.py"), run_name="__main__")
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return run


def figures(out, label):
    """Return the validation loss, the test loss and the distance of a set of weights."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{label}  ")]
    return [float(figure) for figure in line.removeprefix(label).split()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run as from the command line: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    script = [sys.executable, str(EXAMPLES / "choose_later.py"), *QUICK, "--output", "mine"]
    run = subprocess.run(script, cwd=folder, capture_output=True, check=False, encoding="utf-8", env=ENVIRONMENT)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout, folder / "mine"


@pytest.mark.slow
def test_the_synthesised_average_has_the_losses_and_the_weights_of_the_one_that_was_really_kept(finished):
    out, _ = finished
    made, kept, raw = (figures(out, row) for row in ("best, synthesised", "best, really kept", "the last weights"))
    assert made[:2] == pytest.approx(kept[:2], rel=1e-3)
    assert made[2] < 1e-3
    assert kept[2] == 0
    assert raw[2] > 5 * made[2]


@pytest.mark.slow
def test_the_one_with_the_lowest_validation_loss_is_marked_compared_and_drawn(finished):
    out, folder = finished
    tried = [line for line in out.splitlines() if line.startswith("EMA, decay") and "%" in line]
    losses = {float(line.split()[4]): "<- best" in line for line in tried}
    assert len(losses) >= 9
    assert [marked for _, marked in sorted(losses.items())] == [True] + [False] * (len(losses) - 1)
    assert min(losses) == pytest.approx(figures(out, "best, synthesised")[0], rel=1e-5)
    pixels = matplotlib.image.imread(folder / "sweep.png")
    assert pixels.shape[0] > 500
    assert pixels[..., :3].std() > 0.05


@pytest.mark.slow
def test_what_it_prints_at_the_end_loads_the_best_average_with_its_loss(finished):
    out, folder = finished
    code = out[out.index("from characters.model") :]
    check = (
        "from characters.model import measured\nfrom characters.text import load\n"
        "print(f\"{measured(model.eval(), load()['validation'], 32):.5f}\")"
    )
    script = [sys.executable, "-c", f"{code}\n{check}"]
    run = subprocess.run(script, cwd=EXAMPLES, capture_output=True, check=False, encoding="utf-8", env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(figures(out, "best, synthesised")[0], abs=2e-5)
    saved = load_file(folder / "best.safetensors")
    assert torch.equal(saved["embedding.weight"], saved["output.weight"])


def test_a_run_is_not_written_over_another_one(example, tmp_path):
    (tmp_path / "choose_later").mkdir()
    (tmp_path / "choose_later" / "thesis.txt").write_text("years of work", encoding="utf-8")
    status, out, err = example(*QUICK)
    assert (status, out) == (2, "")
    assert err == (
        "choose_later.py: --output choose_later: is there already; remove it, or name a folder that is new or empty\n"
    )
    assert [path.name for path in (tmp_path / "choose_later").iterdir()] == ["thesis.txt"]


WRONG = {
    "--steps 19": "--steps 19: expected 20 or more",
    "--steps 100 --every 101": "--every 101: expected at most the 100 steps of the run",
    "--every 0": "--every 0: expected 1 or more",
    "--windows 0": "--windows 0: expected 1 or more",
    "--seed -1": "--seed -1: expected a whole number from 0 to",
    "--output no/folder": "--output no/folder: expected a folder in one that exists",
    "--steps many": "error: argument --steps: invalid int value: 'many'",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_input_gets_one_line_and_status_2_before_any_training(options, example, tmp_path):
    status, out, err = example(*options.split())
    assert (status, out) == (2, "")
    assert WRONG[options] in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def text(monkeypatch):
    """The module that reads the text."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from characters import text

    return text


def test_another_file_takes_the_place_of_one_that_this_python_does_not_have(text, tmp_path):
    names = [f"{name}.py" for names in text.FILES.values() for name in names]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name * 10, encoding="utf-8")
    (tmp_path / "heapq.py").unlink()
    with pytest.raises(FileNotFoundError, match="without the sources of its library"):
        text.load(tmp_path)
    (tmp_path / "abc.py").write_text("é", encoding="utf-8")
    parts = text.load(tmp_path)
    assert parts["validation"].symbols[0] == text.SYMBOLS - 1  # what is no printable ASCII character
    sizes = {part: len(text.symbols) for part, text in parts.items()}
    expected = {part: sum(10 * len(f"{name}.py") for name in names) for part, names in text.FILES.items()}
    assert sizes == {**expected, "validation": expected["validation"] - 10 * len("heapq.py") + 1}


def test_the_parts_of_the_text_share_no_file_and_windows_are_always_the_same(text):
    files = [name for names in text.FILES.values() for name in names]
    assert len(files) == len(set(files))
    part = text.Text(torch.arange(100))
    assert part.windows(3, 10)[:, 0].tolist() == [0, 44, 89]
    assert part.windows(3, 10)[-1, -1] == 99
    assert part.random_windows(50, 10).max() <= 99
