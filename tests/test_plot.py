"""Plots show the shares and curves that they were given, name every line, and never overlap two names."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from polyak import EMA, SWA, MissingExtraError, PolyakError, Profile, plot


@pytest.fixture
def ax():
    return Figure(layout="constrained").add_subplot()


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def test_the_shares_of_a_line_are_those_of_the_profile_by_age(ax):
    profile = Profile.of(EMA(decay=0.9), 50)
    assert plot.shares({"ema": profile}, ax) is ax
    ages, shares = lines(ax)["ema"].T
    assert ages.tolist() == list(range(1, 52))
    assert shares.tolist() == [*profile.shares[::-1], 0.0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_a_share_every_ten_steps_is_spread_over_ten_steps(ax):
    profiles = {"swa": Profile.of(SWA(), 4, every=10), "longer": Profile.of(SWA(), 60)}
    plot.shares(profiles, ax)
    _, shares = lines(ax)["swa"].T
    assert shares[:40] == pytest.approx([1 / 40] * 40)
    assert not shares[40:].any()


def test_a_line_over_samples_has_no_point_for_each(ax):
    profiles = {"swa": Profile.of(SWA(), 4, every=2**40), "ema": Profile.of(EMA(decay=0.5), 4, every=2**40)}
    plot.shares(profiles, ax)
    for label, profile in profiles.items():
        ages, shares = lines(ax)[label].T
        assert len(ages) <= 1_000_000
        assert ages[-1] == pytest.approx(2**42, rel=1e-3)
        assert shares @ np.append(np.diff(ages), 1.0) == pytest.approx(1 - profile.start, rel=1e-3)


def test_profiles_that_are_nearly_the_same_are_one_line_and_others_are_not(ax):
    profiles = {name: Profile.of(EMA(decay=decay), 500) for name, decay in {"a": 0.9, "b": 0.9002, "c": 0.95}.items()}
    plot.shares(profiles, ax)
    assert list(lines(ax)) == ["a, b", "c"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a, b", "c"]


def test_linear_ages_run_from_left_to_right_as_the_run_did(ax):
    plot.shares({"swa": Profile.of(SWA(), 30)}, ax, scale="linear")
    left, right = ax.get_xlim()
    assert left > right
    assert lines(ax)["swa"][0, 0] == 0


@pytest.mark.parametrize("n", [0, 1])
def test_an_average_without_updates_or_with_one_can_be_drawn(n, ax):
    plot.shares({"swa": Profile.of(SWA(), n)}, ax)
    ax.figure.draw_without_rendering()
    assert len(ax.lines) == n


def test_curves_keep_their_values_and_equal_ones_are_one_line(ax):
    steps = [10, 20, 30]
    plot.curves({"raw": (steps, [3, 2, 1]), "a": (steps, [3, 1, 0.5]), "b": (steps, [3, 1, 0.5])}, ax)
    assert lines(ax)["raw"].tolist() == [[10, 3], [20, 2], [30, 1]]
    assert list(lines(ax)) == ["raw", "a, b"]


def test_names_at_the_ends_do_not_overlap_and_stand_in_the_order_of_the_lines(ax):
    ends = {f"strategy {i}": ([1, 2], [1.0, 0.1 * 1.01**i]) for i in range(12)}
    plot.curves(ends, ax)
    ax.figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in ax.texts}  # without their threads
    assert len(boxes) == 12
    assert not [pair for pair in combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
    by_height = sorted(boxes, key=lambda name: boxes[name].y0)
    assert by_height == list(ends)


def test_a_curve_that_ends_in_nan_is_drawn_without_a_name(ax):
    plot.curves({"good": ([1, 2], [1, 0.5]), "diverged": ([1, 2], [1, np.nan])}, ax)
    assert [text.get_text() for text in ax.texts] == ["good"]
    assert len(ax.lines) == 2


def test_looks_are_those_given_and_no_two_labels_of_the_palette_look_alike(ax):
    plot.curves({"a": ([1, 2], [1, 2])}, ax, looks={"a": {"color": "#123456", "linestyle": ":"}})
    assert ax.lines[0].get_color() == "#123456"
    looks = plot.palette(map(str, range(25)))
    assert len({str(look) for look in looks.values()}) == 25


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib") as caught:
        plot.shares({})
    assert isinstance(caught.value, PolyakError)
    assert isinstance(caught.value, ImportError)
