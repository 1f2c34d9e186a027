"""The merge ``karcher`` against SLERP and against the definition of the mean."""

from __future__ import annotations

import math

import pytest
import torch

from polyak.merges import About, Slerp
from polyak.registry import Registry
from polyak.testing import check_merge

karcher = pytest.importorskip("polyak_karcher")


def about(weights: tuple[float, ...], count: int) -> About:
    return About("w", (count,), 0, count, weights)


def test_it_obeys_the_laws() -> None:
    check_merge(karcher.Karcher())


def test_two_inputs_of_one_size_are_slerp() -> None:
    a, b = torch.randn(2, 50, dtype=torch.float64)
    b = b * (a.norm() / b.norm())
    for t in (0.25, 0.5):
        wanted = Slerp(t=t).merge([a.clone(), b], None, about((0.5, 0.5), 50))
        made = karcher.Karcher().merge([a, b], None, about((1 - t, t), 50))
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)


def test_no_neighbour_has_a_smaller_sum_of_squared_angles() -> None:
    rows = torch.randn(4, 6, dtype=torch.float64) + 1.0
    rows = rows / rows.norm(dim=1, keepdim=True)
    mean = karcher.Karcher().merge([*rows.clone()], None, about((0.25,) * 4, 6))
    least = (rows @ mean).acos().square().sum()
    for seed in range(50):
        other = mean + 1e-3 * torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert (rows @ (other / other.norm())).acos().square().sum() > least
    assert math.isclose(float(mean.norm()), 1.0)


def test_zeros_are_no_direction() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(karcher.Karcher().merge([zero, zero], None, about((0.5, 0.5), 3)), zero)


def test_it_comes_by_the_hook() -> None:
    registry = Registry(points=[])
    registry.register(karcher, "polyak-karcher")
    assert registry.resolve_merge("karcher") is karcher.Karcher
