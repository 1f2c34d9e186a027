"""Damaged files and states by the hundred: refused by an error of polyak, or what was written, and never a hang.

By default a few cases of a fixed seed run. ``-m exhaustive`` draws a seed and prints it; ``POLYAK_SEED`` repeats one.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random

import pytest
import torch

import polyak
from models import average_bits, drifting, mlp
from posthoc.runs import without_checksums

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::polyak.PolyakWarning"),  # of settings that were changed, and poor synthesis
]
STRATEGIES = {"ema": {"decay": 0.9}, "dema": {}, "lawa": {"window": 2}, "power": {}}
ODD = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1.5, math.nan, math.inf, "", "x", "0",
    "n" * 5000, b"x", [], [1], ["a", "b"], {}, {"a": 1}, {1: 2}, (), (1, 2), torch.zeros(0), torch.zeros(()),
    torch.ones(3), torch.tensor([3]), torch.tensor([True]), torch.tensor([0.1], dtype=torch.float64),
    torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, device="meta"), torch.ones(1).expand(10**9),
    torch.eye(2).to_sparse(), torch.full((1,), math.nan, dtype=torch.float64), object(),
]  # fmt: skip


def seeds(few, request):
    """Return random numbers: those of a fixed seed, or of a new one that is printed."""
    if request.node.get_closest_marker("exhaustive") is None:
        return random.Random(0), few
    seed = int(os.environ.get("POLYAK_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    print(f"POLYAK_SEED={seed}")  # noqa: T201 - to repeat it
    return random.Random(seed), 30 * few


def thorough(few):
    return pytest.mark.parametrize("few", [few, pytest.param(few, marks=pytest.mark.exhaustive, id="exhaustive")])


def used(name="ema"):
    model = mlp()
    averager = polyak.average(model, name, **STRATEGIES[name])
    for _ in drifting(model, 4):
        averager.update()
    return averager


def fresh(name="ema"):
    return polyak.average(mlp(), name, **STRATEGIES[name])


def facts(averager):
    return average_bits(averager), averager.n, averager.rate, averager.skipped, averager.profile().shares.tolist()


def damaged(data, random_):
    """Return bytes with a flipped bit, a zeroed or doubled or missing part, or garbage in their place."""
    data = bytearray(data)
    begin = random_.randrange(len(data))
    end = min(len(data), begin + random_.choice([1, 2, 8, 64, 500]))
    kind = random_.choice(["flip"] * 6 + ["zero", "double", "cut", "drop", "noise"])
    if kind == "flip":
        data[begin] ^= 1 << random_.randrange(8)
    elif kind == "zero":
        data[begin:end] = bytes(end - begin)
    elif kind == "double":
        data[begin:begin] = data[begin:end]
    elif kind == "cut":
        del data[begin:]
    elif kind == "drop":
        del data[begin:end]
    else:
        data[begin:end] = random_.randbytes(end - begin)
    return bytes(data)


@thorough(40)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_file_with_damaged_bytes_is_refused_or_is_what_was_written(tmp_path, request, few, suffix, name):
    random_, cases = seeds(few, request)
    averager = used(name)
    expected, path = facts(averager), tmp_path / f"it{suffix}"
    polyak.save(averager, path)
    data = path.read_bytes()
    for case in range(cases):
        path.write_bytes(damaged(data, random_))
        other = fresh(name)
        before = facts(other)
        try:
            polyak.load(other, path)
        except polyak.StateError as error:
            assert str(error).count("\n") < 10, case  # noqa: PT017 - its length
            assert facts(other) == before, case
        else:
            assert facts(other) == expected, case


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_flipped_bit_of_the_tensors_is_found(tmp_path, suffix):
    averager = polyak.average({"w": torch.arange(1.0, 6.0)}, "ema")
    averager.update()
    path = tmp_path / f"it{suffix}"
    polyak.save(averager, path)
    data = path.read_bytes()
    where = data.index(averager.averages["w"].numpy().tobytes())
    for bit in range(5 * 32):
        flipped = bytearray(data)
        flipped[where + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(polyak.StateError, match=r"damaged or incomplete|checksum"):
            polyak.load(averager, path)


def places(value, path=()):
    """Return the path to each value in nested mappings and lists."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(value, path, change):
    """Return a copy with the value at a path changed."""
    if not path:
        return change(value)
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = changed(value[path[0]], path[1:], change)
    return made if isinstance(value, (dict, list)) else tuple(made)


def restructured(value, random_, odd):
    """Return a copy of nested values of which one was replaced, removed, added, or moved to the place of another."""
    path = random_.choice([*places(value)])
    kind = random_.choice(["replace", "replace", "replace", "remove", "add", "move", "nudge"])

    def change(old):
        if kind == "remove" and isinstance(old, (dict, list, tuple)) and old:
            key = random_.choice([*(old if isinstance(old, dict) else range(len(old)))])
            kept = {k: v for k, v in (old.items() if isinstance(old, dict) else enumerate(old)) if k != key}
            return kept if isinstance(old, dict) else type(old)(kept.values())
        if kind == "add" and isinstance(old, dict):
            return {**old, random_.choice(["n", "extra", 5, "name", "average"]): random_.choice(odd)}
        if kind == "move":
            moved = value
            for key in random_.choice([*places(value)]):
                moved = moved[key]
            return copy.copy(moved)
        if kind == "nudge" and type(old) in {int, float}:
            return old + random_.choice([-1, 1, 1e-9, 2**31])
        return random_.choice(odd)

    return changed(value, path, change)


@thorough(150)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_state_of_another_structure_is_refused_or_goes_on(request, few, name):
    random_, cases = seeds(few, request)
    state = used(name).state_dict()
    for case in range(cases):
        made = restructured(state, random_, ODD)
        other = fresh(name)
        before = facts(other)
        try:
            other.load_state_dict(made)
        except polyak.StateError as error:
            assert str(error).count("\n") < 10, case  # noqa: PT017 - its length
            assert len(str(error)) < 10_000, case  # noqa: PT017 - as above
            assert facts(other) == before, case
        else:
            if other.strategy.name == name:  # another one is that of a plugin which is not installed
                assert other.profile().shares.shape == (other.n,), case
                other.update()
            other.load_state_dict(other.state_dict())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = mlp()
    bank = polyak.bank(model, {"fast": {"name": "ema", "decay": 0.5}, "slow": "dema"})
    with polyak.posthoc.Recorder(bank, folder, every=5):
        for _ in drifting(model, 17):
            bank.update()
    return folder


@pytest.fixture
def bank_run(run, tmp_path):
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@thorough(60)
def test_a_snapshot_with_damaged_bytes_is_refused_or_changes_nothing(bank_run, request, few):
    random_, cases = seeds(few, request)
    files = sorted(bank_run.glob("*.safetensors"))
    expected = polyak.posthoc.synthesize(bank_run, "swa")
    for case in range(cases):
        path = random_.choice(files)
        data = path.read_bytes()
        path.write_bytes(damaged(data, random_))
        try:
            made = polyak.posthoc.synthesize(bank_run, "swa")
        except polyak.StateError:
            pass
        else:
            assert made.coefficients == expected.coefficients, case
            assert all(torch.equal(made.state_dict[key], tensor) for key, tensor in expected.state_dict.items()), case
        path.write_bytes(data)


PLAIN = [
    one
    for one in ODD
    if not isinstance(one, (torch.Tensor, bytes, tuple)) and type(one) is not object and one != {1: 2}
]


@thorough(100)
def test_a_snapshot_that_says_something_else_is_refused_or_synthesised(bank_run, request, few):
    random_, cases = seeds(few, request)
    files = sorted(bank_run.glob("*.safetensors"))
    for case in range(cases):
        path = random_.choice(files)
        data = path.read_bytes()
        old = without_checksums(data)
        length = int.from_bytes(old[:8], "little")
        header = json.loads(old[8 : 8 + length])
        if random_.random() < 0.3:
            header = restructured(header, random_, PLAIN)
        else:
            about = restructured(json.loads(header["__metadata__"]["polyak_snapshot"]), random_, PLAIN)
            header["__metadata__"]["polyak_snapshot"] = json.dumps(about)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + old[8 + length :])
        try:
            made = polyak.posthoc.synthesize(bank_run, "ema", decay=0.8)
        except polyak.PolyakError as error:
            assert str(error).count("\n") < 10, case  # noqa: PT017 - its length
            assert len(str(error)) < 10_000, case  # noqa: PT017 - as above
        else:
            assert made.state_dict.keys() == mlp().state_dict().keys() or "keys" in text.decode(), case
        path.write_bytes(data)
