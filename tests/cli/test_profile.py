"""``polyak profile``: the figures are the profile's own, and wrong inputs are refused in one line."""

from __future__ import annotations

import re
import sys

import pytest

import polyak

STEPS = 1000
MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "PNG": b"\x89PNG"}


def table(out: str) -> dict[str, list[str]]:
    """Return the figures by the average."""
    rows = [re.split(r" {2,}", line) for line in out.splitlines() if "  " in line]
    return {first: others for first, *others in rows}


def test_the_table_has_the_figures_of_each_profile(says):
    status, out, err = says(f"profile ema decay=0.99 + power sigma_rel=0.05 --steps {STEPS}")
    assert (status, err) == (0, "")
    shown = table(out)
    ema, power = (
        polyak.Profile.of(s, STEPS) for s in (polyak.EMA(decay=0.99), polyak.PowerEMA(sigma_rel=0.05))
    )  # fmt: skip
    heads = ["mean age", "half-life", "spread", "spread/run", "equal shares", "start", "from the first"]
    assert shown["average"] == heads
    for label, one in (("ema decay=0.99", ema), ("power sigma_rel=0.05", power)):
        assert shown[label] == [
            f"{one.mean_age:.1f}", f"{one.half_life:.0f}", f"{one.spread:.1f}", f"{one.spread / STEPS:.4f}",
            f"{one.effective_size:.1f}", f"{one.start:.2%}", f"{ema.distance(one):.1%}",
        ]  # fmt: skip
    assert shown["power sigma_rel=0.05"][3] == "0.0500"
    assert shown["ema decay=0.99"][6] == "0.0%"


def test_one_average_is_compared_with_none(says):
    out = says(f"profile swa --steps {STEPS}")[1]
    assert "first one" not in out
    assert len(table(out)["swa"]) == 6


def test_negative_shares_have_no_spread(says):
    assert table(says(f"profile dema decay=0.9 --steps {STEPS}")[1])["dema decay=0.9"][2:4] == ["-", "-"]


@pytest.mark.parametrize(
    ("written", "equal_shares"),
    [
        ("swa start=0.75", "250.0"),  # a part of the run is left out
        ("swa start=751", "250.0"),
        ("swa start=.29", "710.0"),
        ("swa every=10", "100.0"),
        ("swa start=0.75 every=10", "25.0"),
        ("swa origin=first", "1000.0"),
        ("swa origin=initial", "1000.0"),
        ("polyak:swa start=0.5", "500.0"),
        ('{"name":"swa"}', None),
    ],
)
def test_start_every_and_origin_are_settings_too(says, written, equal_shares):
    status, out, err = says(f"profile {written} --steps {STEPS}")
    if equal_shares is None:
        assert (status, out) == (2, "")
        assert err.startswith("polyak: ")
    else:
        assert (status, err) == (0, "")
        assert table(out)[written][4] == equal_shares


def test_every_holds_for_all_averages_but_those_that_have_their_own(says):
    shown = table(says(f"profile swa + swa every=5 --every 10 --steps {STEPS}")[1])
    assert (shown["swa"][4], shown["swa every=5"][4]) == ("100.0", "200.0")


def test_values_are_json_numbers_or_text(says):
    out = says("profile ema_v3 decay=9e-1 use_warmup=true + ema_halflife halflife=.25 unit=run total_steps=1000 "
               "--steps 1000")  # fmt: skip
    assert out[0] == 2  # there is no such unit
    assert "unit" in out[2]
    status, out, err = says("profile ema_v3 decay=9e-1 use_warmup=true + ema decay=.9 --steps 1000")
    assert (status, err) == (0, "")
    assert table(out)["ema decay=.9"][0] == "9.0"


@pytest.mark.parametrize("kind", MAGIC)
def test_the_picture_is_of_the_kind_that_its_name_says(says, tmp_path, kind):
    status, out, err = says(f"profile ema decay=0.99 + swa start=0.5 --steps {STEPS} --plot shares.{kind}")
    assert (status, err) == (0, "")
    assert out.endswith(f"drawn: shares.{kind}\n")
    assert (tmp_path / f"shares.{kind}").read_bytes().startswith(MAGIC[kind])
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_picture_names_every_average(says, tmp_path):
    says(f"profile ema decay=0.99 + swa start=0.5 + dema decay=0.99 + ema --steps {STEPS} --plot shares.svg")
    text = (tmp_path / "shares.svg").read_text(encoding="utf-8")
    # A line on a logarithmic scale shows neither what the start counts nor what counts against the others.
    hidden = ("ema (start:\N{NO-BREAK SPACE}37%)", "dema decay=0.99", "(negative:\N{NO-BREAK SPACE}13%)")
    for label in ("ema decay=0.99", "swa start=0.5", *hidden, "What each past step counts, after 1,000 steps"):
        assert label in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("profile emma --steps 9", r"'emma' cannot be used: strategy: .*'emma'.*Did you mean 'ema'"),
        ("profile ema decai=0.9 --steps 9", r"there is no such setting \(got 0\.9\)\. Did you mean 'decay'"),
        ("profile ema decay=2 --steps 9", r"'ema decay=2' cannot be used: strategy\.decay: .*\(got 2\)"),
        ("profile ema decay=fast --steps 9", r"strategy\.decay: .*\(got 'fast'\)"),
        ("profile ema decay=2 origin=last --steps 9", r"strategy\.decay: .*; .*origin: |origin: .*; .*strategy\.decay"),
        ("profile ema --steps 0", r"--steps: got 0; expected the optimiser steps of the run"),
        ("profile ema --steps -5", r"--steps: got -5; expected"),
        ("profile ema --steps 10000000000", r"--steps: got 10000000000; expected .*to 50,000,000"),
        ("profile ema --steps 9 --every 0", r"every: .*\(got 0\)"),
        ("profile ema --steps 9 --every 10", r"'ema' has no update in 9 steps; check start= and every="),
        ("profile swa start=10 --steps 9", r"'swa start=10' has no update in 9 steps; check start="),
        ("profile swa start=-1 --steps 9", r"start: .*\(got -1\)"),
        ("profile swa start=1.5 --steps 9", r"start: .*\(got 1\.5\)"),
        ("profile ema decay --steps 9", r"got 'decay'; expected KEY=VALUE, as in decay=0\.999"),
        ("profile ema decay= --steps 9", r"got 'decay='; expected KEY=VALUE"),
        ("profile ema =0.9 --steps 9", r"got '=0\.9'; expected KEY=VALUE"),
        ("profile ema decay=0.9 decay=0.8 --steps 9", r"'decay' is given twice: 0\.9 and '0\.8'"),
        ("profile decay=0.9 --steps 9", r"got 'decay=0\.9' where an average begins; expected NAME KEY=VALUE"),
        ("profile ema + --steps 9", r"expected an average on both sides of '\+'"),
        ("profile + ema --steps 9", r"expected an average on both sides of '\+'"),
        ("profile ema dtype=float32 --steps 9", r"dtype: there is no such setting"),
        ("profile lr_weighted --steps 9", r"needs the learning rate of each step"),
        (
            "profile ema --steps 9 --plot a.bmp",
            r"the picture 'a\.bmp' has the type '\.bmp'; expected \.pdf, \.png, \.svg",
        ),
        ("profile ema --steps 9 --plot a", r"the picture 'a' has the type '\(none\)'"),
        ("profile ema --steps 9 --plot no/a.png", r"no/a\.png cannot be written: there is no folder .*; make it first"),
    ],
)
def test_a_wrong_input_is_refused_in_one_line_and_nothing_is_written(says, tmp_path, command, message):
    before = {*tmp_path.iterdir()}
    status, out, err = says(command)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"polyak: .*(?:{message}).*\n", err), err
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["profile ema", "convert ema"])
def test_without_steps_it_asks_for_them(says, command):
    status, out, err = says(command)
    assert (status, out) == (2, "")
    assert "Missing option '--steps'" in err


def test_without_matplotlib_it_says_what_to_install_before_anything_is_computed(says, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = says("profile ema --steps 9 --plot a.png")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"polyak: the picture needs matplotlib, .*: pip install matplotlib\n", err)


def test_a_part_of_the_run_is_whole_steps_where_its_product_is_a_little_less(says):
    assert int(0.29 * 100) == 28
    assert table(says("profile swa start=0.29 --steps 100")[1])["swa start=0.29"][4] == "71.0"
