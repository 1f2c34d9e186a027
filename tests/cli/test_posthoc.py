"""``polyak snapshots``, ``synthesize`` and ``sweep``: what they print is what the library returns, and is written."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from polyak.posthoc import synthesize
from polyak.posthoc.snapshot import Snapshot
from scratch import environment

SYNTHESIZE = "synthesize blocks --target swa -o out.safetensors"
MANY = " ".join(f"--grid k{key}={','.join(map(str, range(20)))}" for key in range(6))


def value(state) -> float:
    return float(state["weight"].mean())


def test_snapshots_are_listed_with_steps_half_lives_and_sizes(says, stores):
    status, out, err = says("snapshots powers")
    assert (status, err) == (0, "")
    head, *shown, total = [re.split(r" {2,}", line) for line in out.splitlines()]
    assert head == ["file", "average", "step", "half-life", "mean age", "size"]
    assert [row[:3] for row in shown[-2:]] == [
        ["long-000000000200.safetensors", "long", "200"], ["short-000000000200.safetensors", "short", "200"],
    ]  # fmt: skip
    assert shown[-1][3] == "8"
    assert [*map(len, shown)] == [6] * 21
    assert shown[0][1:5] == ["start", "0", "-", "-"]
    assert re.fullmatch(r"21 snapshots, [\d.]+ KiB, up to step 200", total[0])


def test_an_average_is_written_as_the_library_makes_it_with_its_figures(says, stores):
    status, out, err = says("synthesize powers --target power --set sigma_rel=0.07 -o out.safetensors")
    assert (status, err) == (0, "")
    made = synthesize(stores / "powers", "power", sigma_rel=0.07)
    assert load_file(stores / "out.safetensors")["weight"].equal(made.state_dict["weight"])
    assert f"profile error   {made.profile_error:.2g} " in out
    assert f"amplification   {made.amplification:.3g} " in out
    assert f"rounding        {made.rounding:.1g} " in out
    assert "at step         200\n" in out
    assert out.endswith("written: out.safetensors\n")
    shown = re.findall(r"^(\S+\.safetensors) +(\d+) +([+-][\d.]+)$", out, flags=re.MULTILINE)
    assert len(shown) == 12
    for name, step, x in shown:
        assert float(x) == pytest.approx(made.coefficients[name], abs=5e-5)
        assert int(name[-24:-12]) == int(step)
    assert f"and {len(made.coefficients) - 12} more, none as large as 0.0001" in out


def test_settings_of_the_engine_and_a_start_as_part_of_the_run_are_understood(says, stores):
    says("synthesize blocks --target swa --set start=0.6 -o out.safetensors")
    assert value(load_file("out.safetensors")) == pytest.approx(sum(range(121, 201)) / 80, rel=1e-6)
    says("synthesize blocks --target swa --set start=0.5 --at-step 120 -o out.safetensors")
    assert value(load_file("out.safetensors")) == pytest.approx(sum(range(61, 121)) / 60, rel=1e-6)


def test_a_dry_run_reads_no_weights_and_writes_nothing(says, stores, monkeypatch):
    read = []
    monkeypatch.setattr(Snapshot, "read_weights", lambda self, name: read.append(name))
    before = {*stores.iterdir()}
    status, out, err = says("synthesize blocks --target swa --dry-run")
    assert (status, err, read) == (0, "", [])
    assert {*stores.iterdir()} == before
    assert re.search(r"^profile error +\d\S*e-1[3-9] ", out, flags=re.MULTILINE)
    assert "written" not in out


def test_nonnegative_coefficients_amplify_nothing(says, stores):
    out = says("synthesize powers --target power --set sigma_rel=0.07 --nonnegative --dry-run")[1]
    assert re.search(r"^amplification   1  ", out, flags=re.MULTILINE)
    assert not re.search(r"  -0\.\d+$", out, flags=re.MULTILINE)


def test_a_warning_is_one_line_without_a_place_in_the_sources(says, stores):
    status, out, err = says("synthesize halves --target ema_debiased --set decay=0.5 -o out.safetensors")
    assert status == 0
    assert out.endswith("written: out.safetensors\n")
    assert re.fullmatch(
        r"polyak: warning: ema_debiased\(decay=0\.5\) cannot be rebuilt accurately .*\n"
        r"polyak: warning: the coefficients' absolute sum is [\d.]+: .*\n",
        err,
    )


def test_a_target_that_counts_a_start_which_was_not_recorded_is_told_so(says, stores):
    (stores / "powers" / "start-000000000000.safetensors").unlink()  # as where the recorder came later
    said = "counts the weights at the start 90%, and no snapshot has them; --set origin=first leaves them out."
    assert said in says("synthesize powers --target ema --set decay=0.9995 --dry-run")[1]
    assert said not in says("synthesize powers --target ema --set decay=0.9995 --set origin=first --dry-run")[1]
    assert said not in says("synthesize blocks --target ema --set decay=0.9995 --dry-run")[1]


def test_a_sweep_prints_all_marks_the_best_draws_and_saves_it(says, stores):
    status, out, err = says("sweep blocks task:far --target swa --grid start=0.1,.25,0.5,0.75,0.9 --plot a.png")
    assert (status, err) == (0, "")
    shown = re.findall(r"^swa\(start=(\d+)\) +\S+% +(\S+) .*?( <- best)?$", out, flags=re.MULTILINE)
    assert [(start, bool(best)) for start, _, best in shown] == [
        ("181", False), ("151", False), ("101", True), ("51", False), ("21", False),
    ]  # fmt: skip
    assert float(shown[2][1]) == pytest.approx(0.5)
    assert out.endswith("best: swa(start=101), written: blocks/best.safetensors\ndrawn: a.png\n")
    assert (stores / "a.png").read_bytes().startswith(b"\x89PNG")
    assert value(load_file("blocks/best.safetensors")) == pytest.approx(150.5)


def test_a_picture_of_a_sweep_says_what_is_better(says, stores):
    says("sweep blocks task:near --mode max --plot a.svg -o best.safetensors")
    text = (stores / "a.svg").read_text(encoding="utf-8")
    assert "<!-- The near of averages of one run, at step 200 -->" in text
    assert "<!-- near (higher is better) -->" in text


def test_several_grids_are_combined_and_fixed_settings_are_kept(says, stores):
    command = "sweep blocks task:near --mode max --target ema_debiased --grid decay=0.9,0.95 --grid every=1,2"
    status, out, _ = says(f"{command} --set start=0.1 -o best.safetensors")
    assert status == 0
    labels = re.findall(r"^ema_debiased\(([^)]*)\)", out, flags=re.MULTILINE)
    wanted = [f"start=21, decay={decay}, every={every}" for decay in (0.9, 0.95) for every in (1, 2)]
    assert sorted(labels) == sorted(wanted)
    assert (stores / "best.safetensors").is_file()
    assert "The best one is at the end of what was tried; a better one may lie beyond." in out


def test_averages_that_were_not_recorded_are_told_so(says, stores):
    out = says("sweep powers task:far --target ema_debiased --grid decay=0.3,0.98 -o best.safetensors")[1]
    assert "1 target (profile error above 0.1) could not be rebuilt accurately; " in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("snapshots nowhere", r"there is no folder 'nowhere'; expected what polyak\.posthoc\.Recorder wrote"),
        ("snapshots empty", r"there .*no snapshot.* in 'empty'; record some"),
        ("synthesize nowhere --target swa --dry-run", r"there is no folder 'nowhere'"),
        ("synthesize empty --target swa --dry-run", r"no snapshot.* in 'empty'"),
        ("synthesize blocks --target swa", r"give the file to write, -o out\.safetensors, or --dry-run"),
        ("synthesize blocks --target swa -o out.pt", r"the file 'out\.pt' has the type '\.pt'; expected \.safetensors"),
        ("synthesize blocks --target swa -o no/out.safetensors", r"there is no folder .*no; make it first"),
        (SYNTHESIZE.replace("out", "blocks/average-000000000200"), r"is one of the snapshots; give another file"),
        (f"{SYNTHESIZE} --at-step 10", r"no snapshot up to step 10 in 'blocks'; the first is of step 20"),
        (f"{SYNTHESIZE} --set start=201", r"no update up to step 200; check start="),
        (f"{SYNTHESIZE} --set start", r"got 'start'; expected KEY=VALUE"),
        (f"{SYNTHESIZE} --set sigma_rel=0.1", r"there is no such setting"),
        (f"{SYNTHESIZE} --set name=ema", r"got 'name=ema'; expected a setting\. Give the name .* in its own place"),
        (f"{SYNTHESIZE} --set start={'[' * 9999}", r"start: Input should be a valid integer"),
        (SYNTHESIZE.replace("out", "folder"), r"folder\.safetensors cannot be written: the path belongs to a folder"),
        (f"{SYNTHESIZE} --at-step -1", r"at_step: got -1; expected an integer from 0"),
        (SYNTHESIZE.replace("swa", "sva"), r".*'sva'.*Did you mean 'swa'"),
        ("sweep nowhere task:far", r"there is no folder 'nowhere'"),
        ("sweep empty task:far", r"no snapshot.* in 'empty'"),
        (
            "sweep blocks nowhere:far",
            r"'nowhere:far' cannot be imported \(No module named 'nowhere'\); expected a function",
        ),
        ("sweep blocks task.far:far", r"'task\.far:far' cannot be imported"),
        ("sweep blocks task:absent", r"'task:absent' cannot be imported \(module 'task' has no attribute 'absent'\)"),
        ("sweep blocks task", r"got 'task'; expected MODULE:FUNCTION"),
        ("sweep blocks :far", r"got ':far'; expected MODULE:FUNCTION"),
        ("sweep blocks ..task:far", r"got '\.\.task:far'; expected MODULE:FUNCTION"),
        ("sweep blocks task:two", r"task:two raised TypeError: two\(\) missing 1 required positional argument"),
        ("sweep blocks task:TENSOR", r"'task:TENSOR' is .*Tensor.*; expected a function that takes a state dict"),
        ("sweep blocks task:TEXT", r"'task:TEXT' is 'no function'; expected a function that takes a state dict"),
        ("sweep blocks task:words", r"evaluate\(\) returned 'good'; expected a number"),
        ("sweep blocks task:far --grid start=1,2", r"--grid and --set belong to a strategy; give its name: --target"),
        ("sweep blocks task:far --set start=1", r"--grid and --set belong to a strategy"),
        ("sweep blocks task:far --target swa --grid start", r"got 'start'; expected KEY=VALUE"),
        ("sweep blocks task:far --target swa --grid start=1,201", r"no update up to step 200"),
        (
            "sweep blocks task:far --target swa --grid start=1 --grid start=2",
            r"--grid has 'start' twice; give all",
        ),
        ("sweep blocks task:far --target swa --grid start=1,2 --set start=1", r"'start' given by --set and by --grid"),
        ("sweep blocks task:far --target swa --grid name=ema,swa", r"got 'name=ema,swa'; expected a setting"),
        (f"sweep blocks task:far --target ema {MANY}", r"--grid has 64,000,000 combinations; expected at most 10,000"),
        ("sweep blocks task:far -o folder.safetensors", r"cannot be written: the path belongs to a folder"),
        ("sweep blocks task:far --target swa --grid start=1,", r"start: .*\(got ''\)"),
        ("sweep blocks task:far --plot a.bmp", r"the picture 'a\.bmp' has the type '\.bmp'"),
        ("sweep blocks task:far -o a.pt", r"the file 'a\.pt' has the type '\.pt'"),
        ("sweep blocks task:far -o blocks/average-000000000200.safetensors", r"is one of the snapshots"),
    ],
)
def test_a_wrong_input_is_refused_in_one_line_and_nothing_is_written(says, stores, command, message):
    (stores / "empty").mkdir()
    (stores / "folder.safetensors").mkdir()
    before = {path: path.stat().st_mtime_ns for path in stores.rglob("*.*") if "__pycache__" not in path.parts}
    status, out, err = says(command)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"polyak: .*{message}.*\n", err), err
    after = {path: path.stat().st_mtime_ns for path in stores.rglob("*.*") if "__pycache__" not in path.parts}
    assert after == before


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: b"x" * 99]
)
@pytest.mark.parametrize(
    "command", ["snapshots blocks", "synthesize blocks --target swa --dry-run", "sweep blocks task:far"]
)
def test_a_damaged_snapshot_is_named_in_one_line(says, stores, damage, command):
    file = stores / "blocks" / "blocks-000000000100.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    status, out, err = says(command)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"polyak: '.*{file.name}' is .*\n", err), err


def test_without_matplotlib_nothing_is_evaluated(says, stores, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = says("sweep blocks task:breaks --plot a.png")
    assert (status, out) == (2, "")
    assert "pip install matplotlib" in err


@pytest.mark.parametrize(("module", "error"), [("unmet", ModuleNotFoundError), ("wrong", AttributeError)])
def test_what_goes_wrong_inside_a_module_is_told_by_its_own_traceback(says, stores, module, error):
    with pytest.raises(error, match="nowhere_to_be_found"):
        says(f"sweep blocks {module}:far")


def test_a_function_that_raises_is_said_in_one_line_with_its_place(says, stores):
    done = subprocess.run(
        [sys.executable, "-m", "polyak", "sweep", "blocks", "task:breaks"],
        cwd=stores, env=environment(stores), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2
    line = (stores / "task.py").read_text().split("\n").index('    raise KeyError("mine alone")') + 1
    assert done.stderr == f"polyak: task:breaks raised KeyError: 'mine alone' (task.py:{line})\n"
    assert not (stores / "blocks" / "best.safetensors").exists()


ENDING = """
import sys, typer

def exits(state):
    sys.exit(0)

def leaves(state):
    raise typer.Exit(0)
"""


@pytest.mark.parametrize("name", ["exits", "leaves"])
def test_an_evaluation_that_ends_the_command_is_no_success(says, stores, name):
    (stores / "ending.py").write_text(ENDING)
    status, out, err = says(f"sweep blocks ending:{name}")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"polyak: .*ended the (process|command).*\n", err), err
    assert not (stores / "blocks" / "best.safetensors").exists()


def test_a_module_that_ends_the_process_is_no_success(says, stores):
    (stores / "script.py").write_text("import sys\nsys.exit(0)\n")
    status, out, err = says("sweep blocks script:far")
    assert (status, out) == (2, "")
    assert "its module ends the process" in err


def test_a_best_average_that_cannot_be_written_is_no_success_and_the_table_is_shown(says, stores):
    (stores / "blocking.py").write_text(
        "from pathlib import Path\ndef far(state):\n    Path('best.safetensors').mkdir(exist_ok=True)\n    return 1.0\n"
    )
    status, out, err = says("sweep blocks blocking:far --target swa -o best.safetensors")
    assert status == 2
    assert "swa" in out
    assert "cannot be written" in err
