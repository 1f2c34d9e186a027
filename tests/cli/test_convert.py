"""``polyak convert``: the nearest member of each family, with settings that can be copied."""

from __future__ import annotations

import re

import pytest

import polyak
from polyak.cli.convert import _figure

STEPS = 2000


def rows(out: str) -> list[list[str]]:
    return [re.split(r" {2,}", line) for line in out.splitlines() if "  " in line]


def test_a_decay_becomes_a_width_with_the_remaining_distance_and_the_ages_of_both(says):
    status, out, err = says(f"convert ema decay=0.99 --steps {STEPS} --to power")
    assert (status, err) == (0, "")
    head, source, power = rows(out)
    found = polyak.convert(polyak.EMA(decay=0.99), "power", steps=STEPS)
    assert head == ["average", "settings", "elsewhere", "mean age", "half-life"]
    assert source == ["ema", "decay=0.99", "(wanted)", f"{found.wanted.mean_age:.1f}", f"{found.wanted.half_life:.0f}"]
    assert power[2:] == [f"{found.distance:.2%}", f"{found.profile.mean_age:.1f}", f"{found.profile.half_life:.0f}"]
    sigma_rel, gamma = map(float, re.fullmatch(r"sigma_rel=(\S+) \(gamma=(\S+)\)", power[1]).groups())
    assert sigma_rel == pytest.approx(found.strategy.width, rel=1e-4)
    assert gamma == pytest.approx(found.strategy.exponent, rel=1e-4)


def test_without_a_family_every_other_one_is_tried_and_the_nearest_comes_first(says):
    out = says(f"convert power sigma_rel=0.1 --steps {STEPS}")[1]
    _, source, *found = rows(out)
    assert source[0] == "power"
    families = {
        name for name, cls in polyak.strategies().items() if name != "power" and cls.with_mean_age(1.0, STEPS)
    }  # fmt: skip
    assert {row[0] for row in found} == families
    assert len(families) >= 8
    distances = [float(row[2].rstrip("%")) for row in found]
    assert distances == sorted(distances)
    assert found[0][0] == "polynomial"


def test_the_printed_settings_are_the_average_that_was_found(says):
    for name, settings, _, age, _ in rows(says(f"convert power sigma_rel=0.02 --steps {STEPS}")[1])[2:]:
        again = says(f"profile {name} {settings} --steps {STEPS}")
        assert again[0] == 0, again
        assert float(rows(again[1])[1][1]) == pytest.approx(float(age), abs=0.15)


def test_families_and_cadences_can_be_chosen(says):
    status, out, err = says(f"convert ema decay=0.99 --steps {STEPS} --to lawa --to tail --every 10 --to-every 20")
    assert (status, err) == (0, "")
    _, _, *found = rows(out)
    assert {row[0] for row in found} == {"lawa", "tail"}
    lawa = polyak.convert(polyak.EMA(decay=0.99), "lawa", steps=STEPS, every=10, to_every=20)
    (shown,) = (row[1] for row in found if row[0] == "lawa")
    assert shown == (f"window={lawa.strategy.window}" if lawa.strategy.window != 10 else "-")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.99991234567, "0.999912346"), (0.0852249, "0.085225"), (6931.1234, "6931.1"), (0.5, "0.5"), (0.0, "0"),
     (3, "3"), (123456.7, "123457"), (1.0, "1"), (1e-7, "1e-07"), (True, "True"), ("steps", "steps")],
)  # fmt: skip
def test_settings_have_five_digits_counted_from_one_where_that_is_near(value, shown):
    assert _figure(value) == shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert ema --steps 100 --to swa", r"'swa' is no family with one parameter.*expected one of "),
        ("convert ema --steps 100 --to emma", r".*'emma'.*Did you mean 'ema'"),
        ("convert emma --steps 100", r".*'emma'.*Did you mean 'ema'"),
        ("convert ema decay=2 --steps 100", r"strategy\.decay: .*\(got 2\)"),
        ("convert ema decay --steps 100", r"got 'decay'; expected KEY=VALUE"),
        ("convert decay=0.9 --steps 100", r"where an average begins"),
        ("convert ema --steps 0", r"--steps: got 0"),
        ("convert ema --steps 9 --every 10", r"there is no update in steps=9 with every=10"),
        ("convert ema --steps 9 --every 0", r"every: got 0; expected an integer from 1"),
        ("convert swa start=0.5 --steps 100", r"start"),
        ("convert ema + swa --steps 100", r"got '\+'; expected KEY=VALUE"),
    ],
)
def test_a_wrong_input_is_refused_in_one_line(says, command, message):
    status, out, err = says(command)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"polyak: .*{message}.*\n", err), err
