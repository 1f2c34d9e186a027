"""``polyak bench`` on tiny models: every case runs, and wrong names are refused before anything is measured."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import polyak
from polyak.__main__ import main
from polyak.bench import CASES, MODELS, Settings, measure
from polyak.bench.cases.adamw import APART, TOGETHER
from polyak.bench.cases.bank import SIZES
from polyak.bench.cases.precision import PAIRS
from polyak.bench.cases.scaling import SERIES, scaling
from polyak.bench.limit import LIMITS
from polyak.bench.models import build, size
from polyak.bench.settings import kernel_names
from polyak.errors import ConfigError, MissingExtraError

TINY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

def with_inputs():
    return net(), torch.randn(4, 4)

def with_a_tuple_of_inputs():
    return net(), (torch.randn(4, 4),)

def with_wrong_inputs():
    return net(), torch.randn(4, 5)

def broken():
    raise ValueError("no such\\nlayer")

def other():
    return {"not": "a module"}
"""
QUICK = ("--seconds", "0", "--kernel", "auto", "--against", "timm-v3", "--against", "torch")


@pytest.fixture
def says(monkeypatch, capsys, tmp_path):
    """Return a function that runs `polyak bench` beside a module `tiny`, and returns status, output and errors."""
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tiny", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyak", "bench", *arguments])
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
        else:
            status = 0
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def small(monkeypatch):
    """Make the series of the case `scaling` short."""
    for name, series in SERIES.items():
        monkeypatch.setitem(SERIES, name, series._replace(counts=series.counts[:2]))


@pytest.mark.parity
def test_an_update_is_measured_with_one_thread_and_with_all(says, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for options, expected in (((), ["1 thread", "2 threads"]), (("--threads", "2"), [""])):
            status, _, _ = says("--model", "tiny:net", *QUICK, *options, "--json", "a.json")
            assert status == 0
            rows = json.loads((tmp_path / "a.json").read_text())["rows"]
            assert [*dict.fromkeys(row["setting"] for row in rows)] == expected
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parity
def test_the_command_shows_a_table_and_writes_numbers_and_picture(says, tmp_path):
    files = ("--json", "a.json", "--plot", "a.png")
    status, out, err = says("--model", "tiny:net", *QUICK, *files)

    assert (status, err) == (0, "")
    (first,) = (line for line in out.splitlines() if line.startswith("tiny:net  polyak auto"))
    assert "MiB" in first
    assert "Machine: " in out
    assert f"torch {torch.__version__}" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found.keys() == {"machine", "memory", "versions", "settings", "rows", "notes"}
    assert found["settings"]["models"] == "('tiny:net',)"
    rows = {one["subject"]: one for one in found["rows"]}
    assert list(rows) == ["polyak auto", "polyak propagate", "timm-v3", "torch", "flat lerp_", "flat add"]
    for one in rows.values():
        assert one["milliseconds"].keys() == {"low", "first", "median", "third", "high", "count"}
        assert one["milliseconds"]["median"] > 0
        assert one["limit"]["median"] > 0
        assert one["reference"] == "timm-v3"
        assert (one["tensors"], one["values"]) == (6, 40 + 16 + 16)
    assert rows["timm-v3"]["ratio"]["median"] == 1.0
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parity
@pytest.mark.usefixtures("small")
def test_every_case_of_one_process_runs(says, tmp_path):
    cases = [case for case in CASES if case != "ranks"]  # see test_ranks.py
    quick = ("--seconds", "0", "--kernel", "auto", "--kernel", "loop", "--against", "timm-v3")
    status, out, err = says(*cases, "--model", "tiny:with_inputs", *quick, "--json", "a.json")

    assert (status, err) == (0, "")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    of = {case: [one for one in rows if one["case"] == case] for case in CASES}
    assert {one["setting"] for one in of["precision"]} == {*PAIRS}
    assert {one["subject"] for one in of["host"]} == {"polyak auto", "timm-v3"}
    assert of["construction"][0]["reference"] == "copy.deepcopy"
    assert all(one["kept"] > 0 for one in of["construction"])
    assert of["step"][0]["subject"] == "training step"
    assert all(one["share"]["median"] > 0 for one in of["step"][1:])
    assert {one["model"] for one in of["scaling"]} == {*SERIES}
    assert [one["subject"] for one in of["adamw"]] == [APART, TOGETHER, "AdamW(fused=True) alone"]
    assert {one["setting"] for one in of["bank"]} == {
        f"{count} averages, {k}" for count in SIZES for k in ("auto", "loop")
    }
    assert [one for one in rows if one["group"] == "polyak" and one["remark"] and one["case"] != "scaling"] == []
    for case in cases:
        assert CASES[case].title in out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("gigabytes", "subjects"), [(1.0, 4), (8e-6, 1), (1e-6, 0)])
def test_models_too_large_for_all_are_measured_with_fewer_and_that_is_told(gigabytes, subjects, monkeypatch):
    module = sys.modules[scaling.__module__]
    monkeypatch.setattr(module, "available", lambda device: int(gigabytes * 1e9))
    monkeypatch.setitem(SERIES, "100 tensors", SERIES["100 tensors"]._replace(counts=(400,)))
    settings = Settings(kernels=("auto", "loop"), against=(), seconds=1.0)

    found = [row for row in scaling(settings) if row.model == "100 tensors"]
    told = [row.remark for row in found if row.subject == "-"]
    assert [row.subject for row in found if row.milliseconds] == ["polyak auto", "polyak loop", *LIMITS][:subjects]
    said = {4: [], 1: ["partly measured: all of it needs 9.4 KiB"], 0: ["not measured: all of it needs 9.4 KiB"]}[
        subjects
    ]
    assert [one.partition(" of memory")[0] for one in told] == said


def test_a_kernel_that_cannot_run_here_is_a_row_with_the_reason(monkeypatch):
    def refuse(model, strategy="ema", *, kernel="auto", **options):
        if kernel == "foreach":
            message = "no foreach here"
            raise MissingExtraError(message)
        return average(model, strategy, kernel=kernel, **options)

    average = polyak.average
    monkeypatch.setattr(polyak, "average", refuse)
    report = measure(["update"], Settings(models=("batchnorms",), kernels=("loop", "foreach"), against=(), seconds=0))

    rows = {one.subject: one for one in report.rows}
    assert rows["polyak foreach"].remark == "MissingExtraError: no foreach here"
    assert rows["polyak foreach"].milliseconds is None
    assert rows["polyak loop"].ratio is not None
    assert rows["polyak loop"].reference == "polyak loop", "without timm the first is what others are compared with"


def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    run = CASES["update"]
    monkeypatch.setitem(CASES, "host", run._replace(run=interrupted))
    settings = Settings(models=("batchnorms",), kernels=("foreach",), against=(), seconds=0)
    report = measure(["update", "host"], settings)

    assert {one.case for one in report.rows} == {"update"}
    assert report.notes == ["Interrupted: what was measured until then is shown."]


@pytest.mark.usefixtures("says")
@pytest.mark.parametrize("callable_", ["with_inputs", "with_a_tuple_of_inputs"])
def test_a_model_comes_with_its_inputs_in_either_form(callable_):
    subject = build(f"tiny:{callable_}", torch.device("cpu"))
    assert [tuple(tensor.shape) for tensor in subject.inputs] == [(4, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["updat"], "no case is called 'updat'. Did you mean 'update'?"),
        (["--model", "resnet81"], "no model is called 'resnet81'. Did you mean 'resnet18'?"),
        (["--kernel", "foreeach"], "no kernel is called 'foreeach'. Did you mean 'foreach'?"),
        (["--against", "timm"], "no library is called 'timm'. Did you mean 'timm-v"),
        (["--strategy", "emma"], "no strategy is called 'emma'. Did you mean 'ema'?"),
        (["--device", "nowhere"], "the device 'nowhere' cannot be used here"),
        (["--ranks", "2", "--ranks", "0"], "ranks: got 0; expected 1 to "),
        (["--ranks", "100000"], "here, 8 for each core"),
        (["--plot", "a.xyz", "--model", "tiny:net"], "has the type '.xyz'; expected .pdf, .png, .svg"),
        (["--threads", "0"], "threads: got 0; expected an integer from 1"),
        (["--threads", "1000000000"], "threads: got 1000000000; expected an integer from 1 to 4,096"),
        (["--seconds", "nan"], "seconds: got nan; expected a finite number from 0 on"),
        (["--seconds", "inf"], "seconds: got inf; expected"),
        (["--seconds", "-1"], "seconds: got -1.0; expected"),
        (["--model", "tiny:broken"], "the model 'tiny:broken' cannot be made: ValueError: no such layer"),
        (["--model", "tiny:absent"], "the model 'tiny:absent' cannot be made: AttributeError"),
        (["--model", "nowhere:net"], "the model 'nowhere:net' cannot be made: ModuleNotFoundError"),
        (["--model", "tiny:other"], "'tiny:other' made dict; it must return a torch.nn.Module"),
        (["step", "--model", "tiny:net", *QUICK], "does not know what to call it with"),
        (["step", "--model", "tiny:with_wrong_inputs", *QUICK], "cannot train 'tiny:with_wrong_inputs' on its inputs"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(says, arguments, message):
    status, out, err = says(*arguments)

    assert (status, out) == (2, "")
    assert err.startswith("polyak: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_file_in_a_folder_that_is_not_there_is_refused_before_anything_is_measured(says):
    status, _, err = says("--json", "nowhere/a.json", "--model", "tiny:broken")

    assert status == 2
    assert "make it first" in err


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(says, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = says("--plot", "a.png", "--model", "tiny:broken")

    assert status == 2
    assert "pip install matplotlib" in err


def test_a_package_that_is_missing_is_named_with_the_models_that_need_it(says, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    status, _, err = says("--model", "resnet50")

    assert status == 2
    assert "pip install torchvision" in err
    assert "resnet18, resnet50, convnext_tiny, vit_b_16; gpt2, tiny-tensors, batchnorms need torch alone" in err


def test_a_library_that_is_not_installed_is_refused_where_it_was_asked_for(says, monkeypatch):
    from polyak.bench import libraries

    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "torch_ema" else name)
    status, _, err = says("--against", "torch-ema", "--model", "tiny:net")

    assert status == 2
    assert "the library 'torch-ema' is not installed: pip install torch-ema" in err
    assert "torch-ema" not in libraries.installed(None)


def test_the_models_are_as_large_as_they_are_said_to_be():
    cpu = torch.device("cpu")
    assert size(build("tiny-tensors", cpu).model) == (4_000, 4_000 * 64)
    assert size(build("batchnorms", cpu).model) == (800, 800 * 64)
    with torch.device("meta"):
        tensors, values = size(MODELS["gpt2"].make())
    assert (tensors, values) == (148, 124_439_808)


def test_a_model_is_the_same_each_time():
    first, second = (build("resnet18", torch.device("cpu")).model for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_the_small_language_model_predicts_words_with_its_embedding():
    from polyak.bench.gpt import GPT

    model = GPT(words=11, length=8, width=8, depth=2, heads=2)
    tokens = torch.randint(11, (3, 5))
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % 11

    assert model(tokens).shape == (3, 5, 11)
    assert model.head.weight is model.embedding.weight
    torch.testing.assert_close(model(tokens)[:, :-1], model(later)[:, :-1])


def test_all_strategies_take_part_with_one_kernel_and_the_first_with_all():
    settings = Settings(strategies=("all",))
    assert settings.chosen_strategies()[0] == "ema"
    assert {"swa", "ema_v3"} <= {*settings.chosen_strategies()}
    assert settings.chosen_kernels("ema") == kernel_names()
    assert settings.chosen_kernels("swa") == ("auto",)


def test_settings_refuse_what_is_unknown():
    with pytest.raises(ConfigError, match=r"Known: .*resnet18.*or module:callable"):
        Settings(models=("nothing",))


def test_the_threads_are_as_before_after_a_run():
    measure(["bank"], Settings(models=("batchnorms",), threads=2, seconds=0))
    assert torch.get_num_threads() == 1


def test_only_floating_tensors_are_counted_once():
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    tied.append(tied[0])
    assert size(tied) == (5, 9 + 4 * 3)
