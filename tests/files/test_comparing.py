"""`polyak.files.diff` and `path`: how far two checkpoints are apart, and the loss between them."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from files.conftest import weights
from polyak import files
from polyak.errors import ConfigError


@pytest.fixture
def two(tmp_path):
    for seed in range(2):
        save_file(weights(seed), tmp_path / f"{seed}.safetensors")
    return tmp_path / "0.safetensors", tmp_path / "1.safetensors"


def test_distances_are_those_of_torch(two):
    found = files.diff(*two)
    a, b = (load_file(path) for path in two)
    for one in found.tensors:
        x, y = a[one.name].double().flatten(), b[one.name].double().flatten()
        assert one.distance == pytest.approx((x - y).norm().item())
        assert one.relative == pytest.approx(((x - y).norm() / x.norm()).item())
        assert one.cosine == pytest.approx(torch.cosine_similarity(x, y, 0).item())
        assert one.largest == (x - y).abs().max()
    relative = [one.relative for one in found.sorted()]
    assert relative == sorted(relative, reverse=True)
    assert found.integers == ("norm.num_batches_tracked",)
    whole = torch.cat([(a[one.name].double() - b[one.name].double()).flatten() for one in found.tensors])
    assert found.whole.distance == pytest.approx(whole.norm().item())


def test_zeros_and_names_that_one_lacks(tmp_path):
    torch.save({"zero": torch.zeros(3), "mine": torch.ones(1), "same": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"zero": torch.ones(3), "yours": torch.ones(1), "same": torch.ones(2)}, tmp_path / "b.pt")
    found = files.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    first, same = found.sorted()
    assert first.relative == math.inf
    assert math.isnan(first.cosine)
    assert (same.distance, same.cosine) == (0.0, 1.0)
    assert (found.only_first, found.only_second) == (("mine",), ("yours",))


def test_the_line_ends_at_the_files_themselves(two):
    seen = []
    line = files.path(*two, lambda state: seen.append(state) or state["embed.weight"].sum().item(), points=5)
    a, b = (load_file(path) for path in two)
    for state, wanted in ((seen[0], a), (seen[-1], b)):
        assert {*state} == {*wanted}
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    half = (a["embed.weight"].double() + b["embed.weight"].double()) / 2
    assert torch.equal(seen[2]["embed.weight"], half.float())
    assert line.positions == (0, 0.25, 0.5, 0.75, 1)
    assert line.barrier == pytest.approx(0, abs=1e-5)


def test_a_barrier_in_the_middle(two):
    values = iter([1.0, 3.0, 2.0])
    line = files.path(*two, lambda _: next(values), points=3)
    assert (line.barrier, line.best) == (1.5, 0.0)
    values = iter([1.0, 3.0, 2.0])
    assert files.path(*two, lambda _: next(values), points=3, mode="max").best == 0.5
    for wrong in (lambda _: "good", lambda _: float("nan"), lambda _: None):
        with pytest.raises(ConfigError, match="expected a finite number"):
            files.path(*two, wrong)
    with pytest.raises(ConfigError):
        files.path(*two, lambda _: 1.0, points=1)


def test_pictures(two):
    pytest.importorskip("matplotlib")
    ax = files.diff(*two).plot()
    assert ax.get_ylabel() == "relative distance"
    assert len(ax.lines) == 4
    ax = files.path(*two, lambda state: state["embed.weight"].sum().item(), points=3).plot(label="sum")
    assert [line.get_label() for line in ax.lines][1] == "sum"
