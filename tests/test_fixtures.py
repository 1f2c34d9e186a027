"""Files of every format go on bit for bit: those in tests/fixtures were written by the versions that had the format."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

import polyak
from fixtures.recipe import BANK, FOLDER, LAST, RUNS, SAVED, averager_of, model_at, run, seen

FORMATS = sorted(FOLDER.glob("format_*"))
KINDS = ("pt", "safetensors", "pickle", "dcp")
KERNELS = ("auto", "foreach", "loop")

pytestmark = [
    pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name),
    pytest.mark.filterwarnings("ignore:the weights hold NaN"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # one process is what is tested
]


def _same(got, expected):
    assert got["averages"].keys() == expected["averages"].keys()
    for name, tensor in expected["averages"].items():
        assert got["averages"][name].dtype == tensor.dtype
        assert torch.equal(got["averages"][name], tensor), name
    assert {**got, "averages": None} == {**expected, "averages": None}


def _expected(folder):
    return torch.load(folder / "expected.pt", weights_only=True)


def _loaded(folder, name, kind, model, **options):
    file = folder / f"{name}.{kind}"
    if kind == "pickle":
        averager = pickle.loads(file.read_bytes())
        assert averager.n == _expected(folder)[name]["saved"]["n"]
        return averager
    averager = averager_of(name, model, **options)
    {"dcp": polyak.distributed.load}.get(kind, polyak.load)(averager, file)
    return averager


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_an_averager_goes_on_from_a_file_bit_for_bit(folder, name, kind):
    model, expected = model_at(name, SAVED), _expected(folder)[name]
    averager = _loaded(folder, name, kind, model)
    _same(seen(averager), expected["saved"])
    if kind == "pickle":
        averager.update(model_at(name, SAVED + 1))  # it has no model until it sees one
        run(_Following(averager, model), model, name, range(SAVED + 2, LAST + 1))
    else:
        run(averager, model, name, range(SAVED + 1, LAST + 1))
    _same(seen(averager), expected["last"])


class _Following:
    def __init__(self, averager, model):
        self._averager, self._model = averager, model

    def update(self):
        self._averager.update(self._model)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", RUNS)
def test_every_kernel_goes_on_from_a_file_bit_for_bit(folder, name, kernel):
    model = model_at(name, SAVED)
    averager = _loaded(folder, name, "pt", model, kernel=kernel)
    run(averager, model, name, range(SAVED + 1, LAST + 1))
    _same(seen(averager), _expected(folder)[name]["last"])


@pytest.mark.parametrize("name", RUNS)
def test_an_uninterrupted_run_ends_as_the_files_say(folder, name):
    model = model_at(name)
    averager = averager_of(name, model)
    run(averager, model, name, range(1, LAST + 1))
    _same(seen(averager), _expected(folder)[name]["last"])


def _bank(folder, kind, model):
    if kind == "pickle":
        return pickle.loads((folder / "bank.pickle").read_bytes())
    bank = polyak.bank(model, BANK, nonfinite="skip")
    if kind == "dcp":
        polyak.distributed.load(bank, folder / "bank.dcp")
    else:
        bank.load_state_dict(torch.load(folder / "bank.pt", weights_only=True))
    return bank


@pytest.mark.parametrize("kind", ["pt", "pickle", "dcp"])
def test_a_bank_goes_on_from_a_file_bit_for_bit(folder, kind):
    model, expected = model_at("ema", SAVED), _expected(folder)
    bank = _bank(folder, kind, model)
    for name, averager in bank.items():
        _same(seen(averager), expected["bank"][name])
    target = bank if kind != "pickle" else _Following(bank, model)
    run(target, model, "ema", range(SAVED + 1, LAST + 1))
    for name, single in [("short", "ema"), ("mean", "swa"), ("latest", "lawa")]:
        _same(seen(bank[name]), expected[single]["last"])


def test_an_averager_goes_on_from_a_folder_of_plain_distributed_checkpoints(folder):
    model = model_at("ema")
    averager = averager_of("ema", model)
    dcp.load({"averager": averager, "weights": model.state_dict()}, checkpoint_id=folder / "plain.dcp")
    _same(seen(averager), _expected(folder)["ema"]["saved"])
    assert torch.equal(model.norm.bias, model_at("ema", SAVED).norm.bias)


def test_a_run_goes_on_into_a_folder_of_snapshots(folder, tmp_path):
    copy = shutil.copytree(folder / "snapshots", tmp_path / "snapshots")
    model = model_at("ema", SAVED)
    bank = _bank(folder, "pt", model)
    _synthesised(copy, bank)
    with polyak.posthoc.Recorder(bank, copy, every=2, blocks=True):
        run(bank, model, "ema", range(SAVED + 1, LAST + 1))
    _synthesised(copy, bank)
    for averager in bank.values():
        assert [step for step, _ in averager.identity.marks if step > SAVED] == [6, 8, 9]


def _synthesised(snapshots, bank):
    for averager in bank.values():
        # The profile, since step 4 was skipped.
        made = polyak.posthoc.synthesize(snapshots, averager.profile()).state_dict
        assert {*averager.averages} - {*made} == {"offset"}  # not persistent
        assert all(torch.equal(made[key], tensor) for key, tensor in averager.averages.items() if key in made)
