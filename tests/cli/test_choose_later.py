"""What the page about choosing later shows: its commands are run, and its table is computed again."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from doctest import ELLIPSIS, OutputChecker
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from polyak import EMA, SWA, BlockMean, DebiasedEMA, PowerEMA, Profile
from polyak.posthoc.least_squares import fit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choose-later.md"
LAST = 4096
TARGETS = {
    **{f"`power`, width {width}": Profile.of(PowerEMA(sigma_rel=width), LAST)
       for width in (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)},
    **{f"EMA, half-life {part} %": Profile.of(DebiasedEMA(decay=0.5 ** (100 / part / LAST)), LAST)
       for part in (1, 2, 10)},
    "`swa`, the last 25 %": Profile.of(SWA(), LAST // 4, start=LAST * 3 // 4 + 1),
    "`swa`, the last 10 %": Profile.of(SWA(), 409, start=LAST - 408),
}  # fmt: skip


def powers(moments: int) -> list[Profile]:
    at = [LAST * i // moments for i in range(1, moments + 1)]
    return [Profile.of(PowerEMA(sigma_rel=width), step) for width in (0.05, 0.1) for step in at]


def blocks(moments: int) -> list[Profile]:
    length = LAST // moments
    return [Profile.of(BlockMean(length=length), length, start=1 + length * i) for i in range(moments)]


STORES = {
    "power, 4": powers(4), "power, 16": powers(16), "power, 64": powers(64), "blocks, 64": blocks(64),
    "both, 64": [*powers(64), *blocks(64)],
}  # fmt: skip


@cache
def fits(store: str) -> dict[str, tuple[float, float]]:
    """Return the error and the amplification of each target."""
    found = fit(STORES[store], [*TARGETS.values()])
    return {name: (one.error, abs(one.coefficients).sum()) for name, one in zip(TARGETS, found, strict=True)}


def table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8").split("| wanted |")[1], flags=re.MULTILINE)
    return {first: others for first, *others in (row.split(" | ") for row in rows)}


def test_the_page_has_a_row_for_each_target():
    assert [*table()] == [*TARGETS]


@pytest.mark.parametrize("name", TARGETS)
def test_errors_and_amplifications_on_the_page_are_what_is_found(name):
    for shown, store in zip(table()[name], STORES, strict=True):
        told_error, told_amplification = map(float, re.fullmatch(r"(\S+) \((\S+)\)", shown).groups())
        error, amplification = fits(store)[name]
        assert error == pytest.approx(told_error, rel=0.06, abs=1e-12)  # the page has two digits
        assert amplification == pytest.approx(told_amplification, rel=0.06)


def test_an_ema_without_correction_needs_the_start():
    """The share on the start is nothing that power averages have; block means do not, either, but it is recorded."""
    wanted = [Profile.of(EMA(decay=0.9995), LAST)]
    start = Profile(wanted[0].shares[:0], wanted[0].steps[:0], start=1.0)
    (without,) = fit(powers(64), wanted)
    (with_start,) = fit([*STORES["both, 64"], start], wanted)
    assert without.error > 0.5
    assert with_start.error < 1e-3


@pytest.mark.slow
def test_the_commands_on_the_page_print_what_it_says(says):
    namespace = vars(ModuleType("__main__"))
    text = PAGE.read_text(encoding="utf-8")
    ran = 0
    for kind, source in re.findall(
        r"^```(python(?: title=\"[^\"]+\")?|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    ):
        if title := re.search(r'title="(.*)"', kind):
            Path(title[1]).write_text(source, encoding="utf-8")
        elif kind == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(source, str(PAGE), "exec"), namespace)  # the page is ours
        else:
            whole = re.sub(r" \\\n +", " ", source)  # a command may go on in the next line
            for command, wanted in re.findall(r"^\$ polyak (.*)\n((?:(?!\$ ).*\n)*)", whole, flags=re.MULTILINE):
                status, out, err = says(command)
                assert (status, err) == (0, "")
                assert OutputChecker().check_output(wanted, out, ELLIPSIS), f"{command}\n{out}\n---\n{wanted}"
                ran += 1
    assert ran >= 5
