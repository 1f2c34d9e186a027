"""States that are damaged or made up: all of them are refused in words, and nothing is adopted."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import polyak
from models import average_bits, drifting, mlp


@pytest.fixture(scope="module")
def saved():
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9)
    for _ in drifting(model, 3):
        averager.update()
    return averager.state_dict()


def history(runs, strides, last, **more):
    columns = torch.tensor(runs, dtype=torch.float64), torch.tensor(strides), torch.tensor(last)
    return ({**dict(zip(("rates", "strides", "last"), columns, strict=True)), **more},)


def nested(depth, inner=1):
    for _ in range(depth):
        inner = [inner, inner]
    return inner


def cyclic():
    settings = {"name": "ema"}
    settings["own"] = settings
    return settings


PROGRESS = {
    "a count that is a text": {"calls": "x"}, "no step": {"step": None}, "a fraction": {"averaged": 1.5},
    "a list": {"elapsed": [1]}, "negative steps": {"elapsed": -7}, "a truth for a number": {"n": True},
    "a tensor": {"step": torch.zeros(3)}, "a number that torch has not": {"step": 2**63},
    "a mass of NaN": {"mass": math.nan}, "an infinite mass": {"mass": math.inf}, "a mass as text": {"mass": "1"},
    "a rate above 1": {"rate": 1.5}, "fewer calls than updates": {"calls": 1},
    "steps that do not add up": {"elapsed": 4},
    "no last update": {"averaged": -1}, "another last rate": {"rate": 0.2}, "another step": {"step": 9},
}  # fmt: skip
HISTORIES = {
    "NaN": history([math.nan], [1], [3]), "a rate of 7": history([7.0], [1], [3]),
    "a negative rate": history([-0.1], [1], [3]), "a rate of 7 before the last": history([7.0, 0.1], [1, 1], [1, 3]),
    "ends that go back": history([0.1, 0.2], [1, 1], [5, 3]), "an empty run": history([0.2, 0.1], [1, 1], [3, 3]),
    "a negative stride": history([0.1], [-4], [3]), "a stride of 0": history([0.1], [0], [3]),
    "another count": history([0.1], [1], [4]), "other lengths": history([0.1, 0.1], [1], [3]),
    "two dimensions": history([[0.1]], [[1]], [[3]]), "fractions of strides": history([0.1], [1.0], [3]),
    "lists": ({"rates": [0.1], "strides": [1], "last": [3]},), "nothing": None, "no column": ({},),
    "two columns": ({"rates": torch.ones(1), "last": torch.tensor([3])},),
    "an unknown key": history([0.1], [1], [3], x=1),
    "changes that are a text": history([0.1], [1], [3], changes="x"), "two histories": 2 * history([0.1], [1], [3]),
    "more values than bytes": history([0.1], [1], [3], rates=torch.ones(1).double().expand(10**12)),
    "an identity without marks": history([0.1], [1], [3], identity={"start": "ab"}),
    "an identity of numbers": history([0.1], [1], [3], identity={"start": 5, "marks": []}),
    "a mark without a digest": history([0.1], [1], [3], identity={"start": "", "marks": [[3]]}),
    "a mark that is a number": history([0.1], [1], [3], identity={"start": "", "marks": [3]}),
    "a mark at a truth": history([0.1], [1], [3], identity={"start": "", "marks": [[True, "ab"]]}),
    "no values": history([0.1], [1], [3], rates=torch.ones(1, device="meta").double()),
}  # fmt: skip
OTHERS = {
    "a config that is a text": {"config": "x"}, "a cadence of 0": {"config": {"every": 0}},
    "a start that is a text": {"config": {"start": "0"}}, "an origin that is none": {"config": {"origin": "middle"}},
    "a strategy called 5": {"strategy": {"name": 5}}, "a strategy that is a text": {"strategy": "ema"},
    "settings with numbers for names": {"strategy": {"name": "gone", 1: 2}},
    "settings that are tensors": {"strategy": {"name": "ema", "decay": torch.ones(2)}},
    "settings that contain themselves": {"strategy": cyclic()},
    "settings that explode": {"strategy": {"name": "ema", "decay": nested(60)}},
    "a negative count": {"skipped": -3}, "a truth": {"skipped": True},
    "tensors for a count": {"n": torch.tensor([3, 3])},
    "slots that are a tensor": {"slots": torch.zeros(2)}, "slots of tensors": {"slots": {"average": torch.zeros(2)}},
    "slots with numbers for names": {"slots": {"average": {1: torch.zeros(2)}}},
    "generators that are a text": {"generators": "cpu"}, "generators of numbers": {"generators": ((1, 2),)},
    "numbers for generators": {"generators": (1, 2)},
    "a generator that is short": {"generators": (("cpu", torch.zeros(8, dtype=torch.uint8)),)},
    "a format of 0": {"format": 0}, "a format of True": {"format": True}, "a huge format": {"format": 10**5000},
}  # fmt: skip
DAMAGED = {
    **{f"progress: {name}": ("progress", change) for name, change in PROGRESS.items()},
    **{f"history: {name}": ("history", change) for name, change in HISTORIES.items()},
    **{name: ("", change) for name, change in OTHERS.items()},
}


@pytest.mark.parametrize(("part", "change"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state_is_refused_in_a_few_lines_and_nothing_is_adopted(saved, part, change):
    averager = polyak.average(mlp(), "ema", decay=0.9)
    before = average_bits(averager), averager.n
    whole = {"progress": lambda: {"progress": {**saved["progress"], **change}}, "history": lambda: {"history": change}}
    state = {**saved, **whole.get(part, lambda: change)()}
    with pytest.raises(polyak.StateError) as error:
        averager.load_state_dict(state)
    assert len(str(error.value)) < 2000
    assert str(error.value).count("\n") < 10
    assert (average_bits(averager), averager.n) == before


def test_a_history_by_name_and_aliases_by_name_are_those_of_the_first_files(saved):
    averager = polyak.average(mlp(), "ema", decay=0.9)
    (named,) = saved["history"]
    averager.load_state_dict({**saved, "format": 1, "history": named, "aliases": {}, "generators": {}, "later": 1})
    assert averager.n == 3


@pytest.mark.parametrize(
    "bank",
    [{1: 2, "x": 3}, {"x": 3}, {None: {}}, {f"average {i}": {} for i in range(10_000)}, {"n" * 10**7: {}}],
    ids=range(5),
)
def test_a_bank_of_anything_is_refused_by_an_averager_and_by_a_bank(saved, bank):
    for state in ({"format": 1, "bank": bank}, {"format": 1, "bank": {"x": bank}}):
        for one in (polyak.average(mlp(), "ema"), polyak.bank(mlp(), {"x": "ema", "y": "swa"})):
            with pytest.raises(polyak.StateError) as error:
                one.load_state_dict(state)
            assert len(str(error.value)) < 2000


def test_a_bank_of_a_newer_format_says_so(saved):
    bank = polyak.bank(mlp(), {"x": "ema"})
    with pytest.raises(polyak.StateError, match="upgrade polyak"):
        bank.load_state_dict({"format": 3, "bank": {"x": saved}})


def test_names_of_ten_megabytes_are_shortened(saved):
    averager = polyak.average(mlp(), "ema", decay=0.9)
    state = copy.copy(saved)
    state["slots"] = {"average": {**saved["slots"]["average"], "n" * 10**7: torch.ones(1)}}
    with pytest.raises(polyak.StateError, match="unknown: nnn") as error:
        averager.load_state_dict(state)
    assert len(str(error.value)) < 1000
