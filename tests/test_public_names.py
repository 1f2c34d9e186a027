"""What `polyak` exports: these names, each with a docstring that says what it is and shows it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import polyak
import polyak.errors

STRATEGIES = {
    "EMA", "EMAV1", "EMAV2", "EMAV3", "DebiasedEMA", "SWA", "HalfLifeEMA", "TFEMA", "PolynomialAveraging", "PowerEMA",
    "TailAveraging", "LAWA", "DoubleEMA", "BlockMean",
}  # fmt: skip
DESIGNED = {"average", "Averager", "AveragerConfig", "Strategy", "Clock", "Profile", "hookimpl", "strategies"}
LATER = {"Bank", "Conversion", "Move", "Shares", "attach", "bank", "convert", "load", "save", "recalibrate"}
MODULES = {"posthoc"}
ERRORS = set(polyak.errors.__all__)


def test_exactly_the_designed_names_are_exported():
    assert set(polyak.__all__) == DESIGNED | STRATEGIES | LATER | ERRORS | MODULES


def test_the_names_are_sorted_constants_then_classes_then_functions():
    def order(name):
        return 0 if name.isupper() else 1 if name[0].isupper() else 2, name

    assert sorted(polyak.__all__, key=order) == polyak.__all__
    assert len(set(polyak.__all__)) == len(polyak.__all__)


def test_every_exported_strategy_is_a_built_in_with_a_name_and_a_source():
    built_in = {
        name: cls for name, cls in polyak.strategies().items() if polyak.strategies().distribution(name) == "polyak"
    }
    assert {cls.__name__ for cls in built_in.values()} == STRATEGIES
    assert list(built_in) == [
        "ema", "ema_debiased", "ema_v1", "ema_v2", "ema_v3", "swa",
        "ema_halflife", "ema_tf", "polynomial", "power", "tail", "lawa", "dema", "block_mean",
    ]  # fmt: skip
    for name in STRATEGIES:
        cls = getattr(polyak, name)
        assert cls.source
        assert "Source: " in cls.__doc__
        assert "Often confused with: " in cls.__doc__
        assert all(field.description for key, field in cls.model_fields.items() if key != "name")


@pytest.mark.parametrize("name", sorted(set(polyak.__all__) - ERRORS - MODULES - {"hookimpl"}))
def test_every_public_name_has_a_docstring_with_an_example(name):
    doc = inspect.getdoc(getattr(polyak, name))
    assert doc
    assert ">>> " in doc
    assert doc.splitlines()[0].endswith((".", "``."))


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_has_a_docstring_and_is_a_builtin_too(name):
    error = getattr(polyak, name)
    assert inspect.getdoc(error)
    assert error.__module__ == "polyak.errors"
    if name != "PolyakWarning":
        assert issubclass(error, polyak.PolyakError)
        builtins = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert name == "PolyakError" or set(builtins) - {Exception, BaseException, object}


def test_an_errors_text_is_its_message():
    assert str(polyak.UnknownStrategyError("no such thing")) == "no such thing"
    assert str(polyak.ConfigError("one", "two")) == "('one', 'two')"


def test_every_public_method_of_the_averager_is_documented():
    for name, member in vars(polyak.Averager).items():
        if not name.startswith("_"):
            assert inspect.getdoc(member), name


def test_plain_arithmetic_imports_no_torch():
    # The package's own __init__ imports torch; its arithmetic is imported here as if it stood alone.
    code = f"""
import sys, types
sys.modules["torch"] = None  # makes any import of it fail
package = types.ModuleType("polyak")
package.__path__ = [{polyak.__path__[0]!r}]
sys.modules["polyak"] = package
import polyak.clock, polyak.profile, polyak.strategies, polyak.strategy
assert polyak.profile.Profile.of(polyak.strategies.SWA(), 4).shares.tolist() == [0.25] * 4
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
