"""The sweep: it finds the best of many averages, says so in a table and a picture, and saves it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import polyak
from polyak import ConfigError, PolyakWarning, Profile, StateError
from polyak.posthoc import Store, sweep
from posthoc.runs import counted

STEPS = 1000
LIVES = (10, 20, 40, 80, 160, 320)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A weight that moves along a line with noise: short averages are noisy, long ones lag behind."""
    folder = tmp_path_factory.mktemp("noisy")
    values = np.arange(STEPS) * 0.02 + np.random.default_rng(0).normal(0, 3.0, STEPS)
    counted(folder, STEPS, every=20, values=values.tolist(), blocks=True)
    return folder, values


def grid():
    return {f"half-life {h}": {"name": "ema_debiased", "decay": 0.5 ** (1 / h)} for h in LIVES}


def truth(values, half_life):
    """Return the squared distance of an average from the end of the line, by the sum over all steps."""
    weights = 0.5 ** (np.arange(STEPS)[::-1] / half_life)
    return float((weights @ values / weights.sum() - STEPS * 0.02) ** 2)


def loss(state):
    return (state["w"].item() - STEPS * 0.02) ** 2


@pytest.mark.filterwarnings("error")
def test_the_best_average_is_found_and_saved(noisy, tmp_path):
    folder, values = noisy
    exact = {f"half-life {h}": truth(values, h) for h in LIVES}
    found = sweep(folder, loss, grid(), output=tmp_path / "best.safetensors")
    assert found.best.label == min(exact, key=exact.get)
    for row in found.rows:
        assert row.metric == pytest.approx(exact[row.label], abs=0.02 + 3 * row.profile_error)
    assert [row.half_life for row in found.rows] == sorted(row.half_life for row in found.rows)
    lives = [row.half_life * STEPS for row in found.rows]
    assert lives[:4] == pytest.approx(LIVES[:4], abs=1)  # longer ones are cut short by the beginning of the run
    assert found.file == tmp_path / "best.safetensors"
    assert load_file(found.file)["w"].item() == found.synthesis.state_dict["w"].item()
    assert loss(load_file(found.file)) == found.best.metric
    worst = sweep(folder, loss, grid(), mode="max", output=tmp_path / "worst.safetensors")
    assert worst.best.label == max(exact, key=exact.get)
    assert {row.label: row.metric for row in worst.rows} == {row.label: row.metric for row in found.rows}


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")  # a coarse store, on purpose
def test_without_a_name_the_best_lies_in_the_folder_and_is_no_snapshot(tmp_path):
    counted(tmp_path, 100)
    before = len(Store(tmp_path).snapshots)
    for _ in range(2):
        found = sweep(tmp_path, lambda state: -state["w"].item())
        assert found.file == tmp_path / "best.safetensors"
    assert len(Store(tmp_path).snapshots) == before
    assert found.best.half_life == min(row.half_life for row in found.rows)  # the shortest lags the least


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")  # a coarse store, on purpose
def test_the_default_grid_reaches_from_short_to_half_of_the_run(noisy, tmp_path):
    found = sweep(noisy[0], loss, output=tmp_path / "x.safetensors")
    lives = [row.half_life for row in found.rows]
    assert len(lives) == 11
    assert (lives[0], lives[-1]) == (pytest.approx(0.005), pytest.approx(0.5, abs=0.2))
    assert all(row.label.startswith("ema_debiased(decay=0.") for row in found.rows)


def test_a_metric_that_is_not_finite_is_never_the_best(noisy, tmp_path):
    calls = iter([math.nan, 3.0, -math.inf, 2.0, math.inf, 5.0])
    found = sweep(noisy[0], lambda state: next(calls), grid(), output=tmp_path / "x.safetensors")
    assert found.best.metric == 2.0
    assert found.best.label == "half-life 80"
    assert math.isnan(found.rows[0].metric)
    assert "nan" in found.table()
    with pytest.raises(ConfigError, match="every metric was NaN or infinite"):
        sweep(noisy[0], lambda state: math.nan, grid(), output=tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_metric_may_be_a_tensor_and_evaluation_may_spoil_its_copy(noisy, tmp_path):
    def evaluate(state):
        return torch.tensor(loss({"w": state.pop("w")}))

    found = sweep(noisy[0], evaluate, grid(), output=tmp_path / "x.safetensors")
    assert {*load_file(found.file)} == {"w"}


def test_targets_are_labelled_by_what_they_are(tmp_path):
    counted(tmp_path, 100)
    targets = ["swa", polyak.PowerEMA(sigma_rel=0.2), {"name": "ema", "decay": 0.9, "start": 50},
               {"strategy": {"name": "tail", "fraction": 0.1}}, {"strategy": polyak.EMA(decay=0.5), "every": 5},
               Profile.of(polyak.SWA(), 100)]  # fmt: skip
    found = sweep(tmp_path, lambda state: state["w"].item(), targets)
    assert {row.label for row in found.rows} == {
        "swa", "power(sigma_rel=0.2)", "ema(decay=0.9, start=50)", "tail(fraction=0.1)", "ema(decay=0.5, every=5)",
        "profile 6",
    }  # fmt: skip


class Halved(polyak.EMA):
    """An EMA of half the rate, under the name of the other."""

    def rate(self, clock):
        return super().rate(clock) / 2


def test_targets_of_one_label_are_tried_both_and_labels_may_be_numbers(noisy, tmp_path):
    same = [polyak.EMA(decay=0.99), Halved(decay=0.99)]
    found = sweep(noisy[0], len, same, output=tmp_path / "b.safetensors")
    assert [row.label for row in found.rows] == ["ema(decay=0.99)"] * 2
    assert found.rows[0].half_life < found.rows[1].half_life
    found = sweep(noisy[0], lambda state: 1.0, {1: "swa", 0.5: "ema"}, output=tmp_path / "b.safetensors")
    assert {row.label for row in found.rows} == {"1", "0.5"}
    assert "<- best" in found.table()


@pytest.mark.parametrize("sign", [1, -1])
def test_of_equal_metrics_the_first_is_the_best_in_both_modes(noisy, tmp_path, sign):
    mode = "min" if sign == 1 else "max"
    metrics = iter([3.0, math.nan, 1.0, 1.0, 2.0])
    targets = [{"name": "tail", "fraction": fraction} for fraction in (0.1, 0.2, 0.3, 0.4, 0.5)]
    output = tmp_path / "b.safetensors"
    found = sweep(noisy[0], lambda state: sign * next(metrics), targets, mode=mode, output=output)
    assert found.best is found.rows[2]


def test_the_table_marks_the_best_row(noisy, tmp_path):
    found = sweep(noisy[0], loss, grid(), output=tmp_path / "x.safetensors")
    head, *lines = found.table().splitlines()
    assert len(lines) == len(LIVES)
    assert [line.startswith(found.best.label) for line in lines] == [line.endswith("<- best") for line in lines]
    assert sum(line.endswith("<- best") for line in lines) == 1
    assert "half-life/run" in head


def test_the_picture_shows_every_metric_and_the_best(noisy, tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    targets = grid() | {"mostly the start": {"name": "ema", "decay": 0.9999}}
    found = sweep(noisy[0], loss, targets, output=tmp_path / "x.safetensors")
    ax = found.plot(label="squared error")
    (line,) = ax.lines
    assert len(line.get_xdata()) == len(LIVES)  # an average that is mostly its start has no half-life
    np.testing.assert_allclose(line.get_ydata(), [row.metric for row in found.rows if math.isfinite(row.half_life)])
    assert ax.get_ylabel() == "squared error"
    assert any(found.best.label in text.get_text() for text in ax.get_legend().get_texts())
    ax.figure.savefig(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    plt.close("all")


def test_a_best_average_without_half_life_is_drawn_all_the_same(noisy, tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    targets = {"mostly the start": {"name": "ema", "decay": 0.9999}, "swa": "swa"}
    found = sweep(noisy[0], lambda state: abs(state["w"].item()), targets, output=tmp_path / "x.safetensors")
    assert found.best.half_life == math.inf
    found.plot().figure.savefig(tmp_path / "sweep.png")
    plt.close("all")


WRONG = [
    ({"targets": "ema"}, "a list or a mapping"),
    ({"targets": 3}, "a list or a mapping of targets; got 3"),
    ({"targets": polyak.SWA}, "a list or a mapping"),
    ({"targets": polyak.AveragerConfig()}, "a list or a mapping"),
    ({"targets": [None]}, "a target is a strategy's name"),
    ({"targets": {"a": torch.nn.Linear}}, "the target 'a': a target is a strategy's name"),
    ({"mode": ["min"]}, r"mode: got \['min'\]"),
    ({"targets": []}, "nothing to try"),
    ({"targets": {}}, "nothing to try"),
    ({"targets": ["emma"]}, "emma"),
    ({"mode": "best"}, "mode: got 'best'"),
    ({"output": "best.pt"}, "expected .safetensors"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_makes_no_sense_is_refused_before_anything_is_evaluated(noisy, settings, message):
    calls = []
    with pytest.raises(ConfigError, match=message):
        sweep(noisy[0], lambda state: calls.append(1) or 0.0, **settings)
    assert not calls


def test_what_evaluates_to_no_number_is_refused(noisy):
    with pytest.raises(ConfigError, match="evaluate\\(\\) returned None"):
        sweep(noisy[0], lambda state: None, grid())
    for value in (torch.ones(2), torch.tensor(1.0, device="meta"), np.ones(1)):
        with pytest.raises(ConfigError, match=r"evaluate\(\) returned <.*>; expected a number"):
            sweep(noisy[0], lambda state, value=value: value, grid())
    with pytest.raises(StateError, match="there is no snapshot up to step 3"):
        sweep(noisy[0], loss, grid(), at_step=3)


@pytest.mark.parametrize("code", [0, None, 3, "bye"], ids=str)
def test_an_evaluation_that_ends_the_process_is_an_error_with_the_metrics_so_far(noisy, tmp_path, code):
    calls = []

    def evaluate(state):
        calls.append(1)
        return sys.exit(code) if len(calls) == 3 else 0.25

    with pytest.raises(ConfigError, match=r"ended the process by sys\.exit") as error:
        sweep(noisy[0], evaluate, grid(), output=tmp_path / "best.safetensors")
    assert error.value.__notes__ == ["Metrics so far: half-life 10: 0.25, half-life 20: 0.25"]
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "best.metrics.json"}


@pytest.mark.parametrize("raised", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_what_an_evaluation_raises_comes_with_the_metrics_so_far(noisy, tmp_path, raised):
    calls = []

    def evaluate(state):
        calls.append(1)
        if len(calls) == 2:
            raise raised
        return 0.5

    with pytest.raises(type(raised)) as error:
        sweep(noisy[0], evaluate, grid(), output=tmp_path / "best.safetensors")
    assert error.value.__notes__ == ["Metrics so far: half-life 10: 0.5"]


def test_a_best_average_that_cannot_be_written_stays_in_memory_and_says_where_it_should_have_gone(noisy, tmp_path):
    file = tmp_path / "best.safetensors"

    def evaluate(state):
        file.mkdir(exist_ok=True)  # what would be refused before the first evaluation
        return loss(state)

    with pytest.warns(PolyakWarning, match=r"best\.safetensors' cannot be written.*in memory"):
        found = sweep(noisy[0], evaluate, grid(), output=file)
    assert found.file is None
    assert loss(found.synthesis.state_dict) == found.best.metric
    found.synthesis.save(tmp_path / "elsewhere.safetensors")
    assert loss(load_file(tmp_path / "elsewhere.safetensors")) == found.best.metric


FULL = """
import json, resource, signal, sys, warnings, torch, polyak
warnings.simplefilter("ignore")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
averager = polyak.average(torch.nn.Linear(300, 300), "ema", decay=0.9)
with polyak.posthoc.Recorder(averager, folder + "/run", every=2, blocks=False):
    for step in range(4):
        averager.update()
made = polyak.posthoc.synthesize(folder + "/run", "swa")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
calls = {
    "pt": lambda: polyak.save(averager, folder + "/x.pt"),
    "safetensors": lambda: polyak.save(averager, folder + "/x.safetensors"),
    "bank": lambda: polyak.save(polyak.bank(torch.nn.Linear(300, 300), {"a": "ema"}), folder + "/x.pt"),
    "synthesis": lambda: made.save(folder + "/x.safetensors"),
    "folder": lambda: polyak.distributed.save(averager, folder + "/x"),
    "recorder": lambda: (polyak.posthoc.Recorder(averager, folder + "/other", every=1), averager.update()),
    "sweep": lambda: polyak.posthoc.sweep(folder + "/run", lambda state: 1.0, ["swa"]).file,
}
said = {}
for name, call in calls.items():
    try:
        said[name] = str(call())
    except Exception as error:
        said[name] = [base.__name__ for base in type(error).__mro__]
print(json.dumps(said))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of resources are POSIX's")
def test_a_full_disk_is_an_error_of_polyak_everywhere_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("sweep") == "None"
    assert "PolyakError" in said.pop("folder")
    assert all({"WriteError", "PolyakError", "OSError"} <= {*bases} for bases in said.values()), said
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "other", ".x.new"}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".polyak-")]


def test_a_metric_that_requires_a_gradient_is_taken_without_a_warning(noisy, tmp_path):
    def evaluate(state):
        return torch.tensor(float(loss(state)), requires_grad=True)

    found = sweep(noisy[0], evaluate, grid(), output=tmp_path / "x.safetensors")
    assert all(math.isfinite(row.metric) for row in found.rows)


def test_a_wrong_target_is_named(noisy, tmp_path):
    with pytest.raises(polyak.UnknownStrategyError, match="the target 'a': "):
        sweep(noisy[0], loss, {"a": "swaa"}, output=tmp_path / "x.safetensors")


def test_an_inaccurate_target_may_be_the_best_and_the_users_line_is_warned(noisy, tmp_path):
    targets = {"s": {"name": "ema", "decay": 0.3}, "l": {"name": "ema", "decay": 0.99}}
    for first, best in ([0.0, "s"], [2.0, "l"]):
        metrics = iter([first, 1.0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = sweep(noisy[0], lambda state, left=metrics: next(left), targets, output=tmp_path / "x.safetensors")
        assert [row.profile_error > 0.1 for row in found.rows] == [True, False]
        assert found.best.label == best
        assert [(w.filename, "s cannot be rebuilt" in str(w.message)) for w in caught] == [(__file__, True)] * (
            first < 1
        )


def test_a_step_for_a_synthesis_is_called_at_step(noisy):
    with pytest.raises(ConfigError, match=r"step: got 100; .* at_step="):
        polyak.posthoc.synthesize(noisy[0], "swa", step=100)


# Going on from an earlier sweep


def failing_at(*numbers):
    """Return an evaluation that fails at some of its calls, and the metrics of the others."""
    calls, seen = [], []

    def evaluate(state):
        calls.append(1)
        if len(calls) in numbers:
            raise RuntimeError
        seen.append(loss(state))
        return seen[-1]

    return evaluate, seen


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_sweep_goes_on_where_an_earlier_one_stopped(noisy, tmp_path, mode):
    whole = sweep(noisy[0], loss, grid(), mode=mode, output=tmp_path / "whole.safetensors")
    output = tmp_path / "best.safetensors"
    for stop, tried in ((3, 2), (2, 1)):
        evaluate, seen = failing_at(stop)
        with pytest.raises(RuntimeError):
            sweep(noisy[0], evaluate, grid(), mode=mode, output=output, resume=True)
        assert len(seen) == tried
    evaluate, seen = failing_at()
    found = sweep(noisy[0], evaluate, grid(), mode=mode, output=output, resume=True)
    assert len(seen) == len(LIVES) - 3
    assert found.rows == whole.rows
    assert found.best == whole.best
    assert output.read_bytes() == whole.file.read_bytes()
    evaluate, seen = failing_at()
    output.unlink()
    assert sweep(noisy[0], evaluate, grid(), mode=mode, output=output, resume=True).rows == whole.rows
    assert seen == []
    assert output.read_bytes() == whole.file.read_bytes()
    sweep(noisy[0], evaluate, grid(), mode=mode, output=output)
    assert len(seen) == len(LIVES)


def test_metrics_that_are_no_finite_numbers_are_kept_too(noisy, tmp_path):
    metrics = iter([math.nan, math.inf, 3.0])
    targets = dict(list(grid().items())[:3])
    first = sweep(noisy[0], lambda _: next(metrics), targets, output=tmp_path / "best.safetensors")
    again = sweep(noisy[0], loss, targets, output=tmp_path / "best.safetensors", resume=True)
    assert repr(again.rows) == repr(first.rows)


def test_targets_are_known_by_what_they_are_and_not_by_their_labels(noisy, tmp_path):
    first, second = list(grid().values())[2:4]
    evaluate, seen = failing_at()
    for targets in ({"one": first, "other": second}, [second, first], {"one": second, "other": first}):
        found = sweep(noisy[0], evaluate, targets, output=tmp_path / "best.safetensors", resume=True)
        assert sorted(row.metric for row in found.rows) == sorted(seen)
    assert len({*seen}) == len(seen) == 2


@pytest.mark.parametrize("change", [{"at_step": 500}, {"nonnegative": True}], ids=str)
def test_metrics_of_other_averages_are_refused(noisy, tmp_path, change):
    output = tmp_path / "best.safetensors"
    targets = dict(list(grid().items())[:2])
    sweep(noisy[0], loss, targets, output=output)
    before = output.with_suffix(".metrics.json").read_text()
    with pytest.raises(ConfigError, match="holds the metrics of a sweep over other snapshots"):
        sweep(noisy[0], loss, targets, output=output, resume=True, **change)
    assert output.with_suffix(".metrics.json").read_text() == before


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")  # a coarse store, on purpose
def test_metrics_of_a_run_that_has_gone_on_are_refused(tmp_path):
    output = tmp_path / "best.safetensors"
    counted(tmp_path / "short", 100)
    sweep(tmp_path / "short", loss, ["swa"], output=output, resume=True)
    counted(tmp_path / "long", 120)
    with pytest.raises(ConfigError, match="over other snapshots"):
        sweep(tmp_path / "long", loss, ["swa"], output=output, resume=True)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": {}}', '{"of": "x", "rows": {"a": {"metric": "b", "label": ""}}}']
)
def test_a_damaged_file_of_metrics_is_refused_in_words(noisy, tmp_path, text):
    (tmp_path / "best.metrics.json").write_text(text)
    with pytest.raises(ConfigError, match="holds no metrics of a sweep"):
        sweep(noisy[0], loss, ["swa"], output=tmp_path / "best.safetensors", resume=True)


def test_metrics_that_cannot_be_written_are_warned_of_once(noisy, tmp_path):
    (tmp_path / "best.metrics.json").mkdir()
    with pytest.warns(PolyakWarning, match="The sweep continues, and cannot be resumed") as told:
        found = sweep(noisy[0], loss, grid(), output=tmp_path / "best.safetensors")
    assert len([one for one in told if "resumed" in str(one.message)]) == 1
    assert len(found.rows) == len(LIVES)
