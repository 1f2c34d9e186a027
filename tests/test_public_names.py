"""What `polyak` exports: these names, each with a docstring that says what it is and shows it."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import polyak
import polyak.errors

STRATEGIES = {
    "EMA", "EMAV1", "EMAV2", "EMAV3", "DebiasedEMA", "SWA", "HalfLifeEMA", "TFEMA", "PolynomialAveraging", "PowerEMA",
    "TailAveraging", "LAWA", "DoubleEMA", "BlockMean",
}  # fmt: skip
FIRST = {
    "average", "Averager", "AveragerConfig", "Strategy", "Clock", "Profile", "hookimpl", "strategies",
    "EMA", "EMAV3", "DebiasedEMA", "SWA", "HalfLifeEMA", "PowerEMA", "LAWA",
    "Bank", "bank", "attach", "convert", "load", "save", "recalibrate", "PolyakError", "PolyakWarning",
}  # fmt: skip
MODULES = {"posthoc", "optim", "distributed", "errors", "files"}
ERRORS = set(polyak.errors.__all__)
PUBLIC = FIRST | STRATEGIES | ERRORS | {"Conversion", "Move", "Shares"}
"""What can be imported from polyak; `from polyak import *` brings only what a first program needs."""


def test_a_star_import_brings_what_a_first_program_needs():
    assert set(polyak.__all__) == FIRST | MODULES
    assert len(polyak.__all__) <= 30


def test_the_whole_contract_can_be_imported():
    importable = {
        name for name in vars(polyak) if not name.startswith("_") and not inspect.ismodule(getattr(polyak, name))
    }
    assert importable - {"TYPE_CHECKING", "Any", "annotations", "package_hint"} == PUBLIC


def test_no_function_is_also_a_module():
    modules = {module.name for module in pkgutil.iter_modules(polyak.__path__)}
    functions = {name for name in PUBLIC if inspect.isfunction(getattr(polyak, name))}
    assert not modules & functions
    assert callable(polyak.strategies)


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


@pytest.mark.parametrize("name", sorted(PUBLIC - ERRORS - {"hookimpl"}))
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
import polyak.strategy.clock, polyak.strategy.profile, polyak.strategy
assert polyak.strategy.profile.Profile.of(polyak.strategy.SWA(), 4).shares.tolist() == [0.25] * 4
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
