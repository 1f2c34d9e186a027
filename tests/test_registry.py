"""Plugins, with real metadata in a folder on the path: found late, each by itself, never in place of a built-in."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
import torch

import polyak
from polyak.registry import Registry, registry, shared_registry
from scratch import defining, distribute, installed, offering

BUILT_IN = [
    "ema", "ema_debiased", "ema_v1", "ema_v2", "ema_v3", "swa",
    "ema_halflife", "ema_tf", "polynomial", "power", "tail", "lawa", "dema", "block_mean",
]  # fmt: skip

HOOK = "import polyak\n\n@polyak.hookimpl\ndef "
NAMELESS = """
    import polyak

    class Half(polyak.Strategy):
        name: str = "half"

    @polyak.hookimpl
    def polyak_strategies():
        return [Half]
"""
HALF_DONE = """
    import polyak

    @polyak.hookimpl
    def polyak_updated():
        pass

    @polyak.hookimpl
    def polyak_strategies():
        return {}["gone"]
"""
BROKEN = {
    "breaks-import": ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "breaks-syntax": ("def (", "SyntaxError: invalid syntax"),
    "breaks-exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "breaks-hook": (HOOK + "polyak_strategy():\n    pass", "unknown hook 'polyak_strategy' in plugin <module "),
    "breaks-argument": (HOOK + "polyak_updated(averager, tick):\n    pass", "{'tick'} are declared in the hookimpl"),
    "breaks-mark": ("def polyak_strategies():\n    return []", "implements no hook; mark its functions with @polyak"),
    "breaks-offer": (HOOK + "polyak_strategies():\n    return [dict]", "offers <class 'dict'>; expected classes"),
    "breaks-abstract": (NAMELESS, "offers <class 'breaks_abstract.Half'>; expected classes derived from polyak."),
    "breaks-list": (HOOK + "polyak_strategies():\n    return 3", "polyak_strategies() returned 3; expected a list of"),
    "breaks-name": (offering("half:er"), "Half has the name 'half:er'; declare it as  name: Literal['my_name'] ="),
    "breaks-twice": (offering("half").replace("[Half]", "[Half] * 2"), "breaks-twice offers 'half' more than once"),
    "breaks-call": (HALF_DONE, "KeyError: 'gone'"),
    "breaks-field": (offering("half").replace("power:", "every:"), "the strategy class Half defines"),
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv("POLYAK_STRICT_PLUGINS", raising=False)
    monkeypatch.delenv("POLYAK_DISABLE_PLUGINS", raising=False)
    with installed(tmp_path) as site:
        yield site


def fate(names: Registry, distribution: str):
    (plugin,) = [plugin for plugin in names.plugins if plugin.distribution == distribution]
    return plugin


def test_built_ins_come_first_through_the_hook_that_plugins_use():
    names = Registry([])
    assert list(names.strategies()) == BUILT_IN
    assert {names.strategies().distribution(name) for name in BUILT_IN} == {"polyak"}
    assert len(names.manager.hook.polyak_strategies.get_hookimpls()) == 1


def test_an_installed_plugin_is_found_by_its_metadata_and_chosen_by_its_name(site):
    distribute(site, "acme-half", offering("half"), version="2.5")
    assert polyak.strategies().distribution("half") == "acme-half"
    assert fate(registry(), "acme-half") == ("acme-half", "acme-half", "2.5", "acme_half", "", ("half",))
    averager = polyak.average({"w": torch.ones(2)}, "half", power=1.0)
    averager.update()
    assert repr(averager.strategy) == "Half(name='half', power=1.0)"
    assert averager.rate == 1.0


PLUGIN = """
class Plugin:
    @staticmethod
    @polyak.hookimpl
    def polyak_strategies():
        return [Half]

plugin = Plugin()
"""


def test_an_entry_point_may_name_an_object(site):
    distribute(site, "acme-half", defining("half") + PLUGIN, points="half = acme_half:plugin")
    assert fate(Registry(), "acme-half") == ("half", "acme-half", "1.0", "acme_half:plugin", "", ("half",))


def test_two_plugins_whose_classes_are_called_the_same_both_load(site):
    for name in ("one", "two"):
        distribute(site, f"acme-{name}", defining(name) + PLUGIN, points=f"x = acme_{name}:Plugin")
    assert {"one", "two"} <= set(Registry().strategies())


@pytest.mark.parametrize(("distribution", "case"), BROKEN.items(), ids=BROKEN)
def test_a_broken_plugin_is_left_out_with_its_reason_and_harms_no_other(site, distribution, case, caplog):
    source, reason = case
    distribute(site, distribution, source)
    distribute(site, "acme-sound", offering("sound"))
    with caplog.at_level(logging.WARNING, "polyak"):
        names = Registry()
    broken = fate(names, distribution)
    assert reason in broken.error
    assert broken.offers == ()
    assert [f"the plugin {distribution!r} of {distribution} 1.0 cannot be used: {broken.error}"] == caplog.messages
    assert fate(names, "acme-sound").error == ""
    assert set(BUILT_IN) | {"sound"} <= set(names.strategies())
    assert "half" not in names.strategies()
    assert not names.listens


@pytest.mark.parametrize("distribution", ["breaks-hook", "breaks-argument"])
def test_a_misspelt_hook_is_told_the_hooks_there_are(site, distribution):
    distribute(site, distribution, BROKEN[distribution][0])
    assert "The hooks are polyak_merges, polyak_strategies, polyak_updated." in fate(Registry(), distribution).error


@pytest.mark.parametrize(("distribution", "case"), BROKEN.items(), ids=BROKEN)
def test_under_strict_a_broken_plugin_raises_with_its_reason(site, distribution, case, monkeypatch):
    distribute(site, distribution, case[0])
    monkeypatch.setenv("POLYAK_STRICT_PLUGINS", "1")
    with pytest.raises(polyak.PluginError) as caught:
        polyak.strategies()
    assert str(caught.value).startswith(f"the plugin {distribution!r} of {distribution} 1.0 cannot be used: ")
    assert case[1] in str(caught.value)


@pytest.mark.parametrize("value", ["", "0"])
def test_strict_can_be_off(site, value, monkeypatch):
    distribute(site, "breaks-import", BROKEN["breaks-import"][0])
    monkeypatch.setenv("POLYAK_STRICT_PLUGINS", value)
    assert "ema" in polyak.strategies()


@pytest.mark.parametrize("value", ["acme-half", " other , acme-half", "Acme_Half", "h", "acme-half,"])
def test_a_disabled_plugin_is_not_imported(site, value, monkeypatch):
    distribute(site, "acme-half", "raise RuntimeError('imported')", points="h = acme_half")
    monkeypatch.setenv("POLYAK_DISABLE_PLUGINS", value)
    monkeypatch.setenv("POLYAK_STRICT_PLUGINS", "1")
    assert fate(Registry(), "acme-half").error == "disabled by POLYAK_DISABLE_PLUGINS"
    assert "acme_half" not in sys.modules


def test_an_unknown_name_is_told_the_nearest_the_known_and_the_plugins_that_failed(site, monkeypatch):
    distribute(site, "acme-half", offering("half"))
    distribute(site, "breaks-import", BROKEN["breaks-import"][0], version="0.3")
    distribute(site, "acme-off", offering("off"))
    monkeypatch.setenv("POLYAK_DISABLE_PLUGINS", "acme-off")
    with pytest.raises(polyak.UnknownStrategyError) as caught:
        polyak.average({"w": torch.ones(1)}, "hafl")
    place, first, *rest = str(caught.value).split("\n")
    assert place == "average(): the settings cannot be used:"
    assert first.startswith("  strategy: no strategy is called 'hafl'. Did you mean 'half'? Known: ema, ema_debiased")
    assert "half" in first.partition("Known: ")[2]
    assert set(rest) == {
        "These plugins are not there:",
        "  plugin breaks-import (breaks-import 0.3): ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        "  plugin acme-off (acme-off 1.0): disabled by POLYAK_DISABLE_PLUGINS",
    }


def test_an_unknown_name_is_a_key_error_and_a_value_error_that_reads_as_written():
    with pytest.raises(KeyError) as caught:
        Registry([]).resolve("emma")
    assert isinstance(caught.value, ValueError)
    assert str(caught.value) == f"no strategy is called 'emma'. Did you mean 'ema'? Known: {', '.join(BUILT_IN)}."


def test_a_clash_raises_when_chosen_and_names_both(site):
    distribute(site, "acme-one", offering("half", "One"))
    distribute(site, "acme-two", offering("half", "Two"))
    assert {"acme-one:half", "acme-two:half"} <= set(polyak.strategies())
    assert "half" not in polyak.strategies()
    with pytest.raises(polyak.UnknownStrategyError) as caught:
        polyak.average({"w": torch.ones(1)}, "half")
    said, _, choices = str(caught.value).partition("; choose ")
    assert said.endswith("strategy: the strategy 'half' is offered by 2 plugins")
    assert sorted(choices.split(" or ")) == ["'acme-one:half'", "'acme-two:half'"]


PICKS = [("acme-one:half", "One"), ("acme-two:half", "Two"), ("Acme_Two:half", "Two")]


@pytest.mark.parametrize(("name", "cls"), PICKS)
def test_of_two_plugins_the_distribution_picks_one(site, name, cls):
    distribute(site, "acme-one", offering("half", "One"))
    distribute(site, "acme-two", offering("half", "Two"))
    averager = polyak.average({"w": torch.ones(1)}, name, power=0.25)
    assert repr(averager.strategy) == f"{cls}(name='half', power=0.25)"


def test_a_clash_survives_in_configs(site):
    distribute(site, "acme-one", offering("half", "One"))
    distribute(site, "acme-two", offering("half", "Two"))
    config = polyak.AveragerConfig(strategy="acme-two:half")
    assert config.model_dump()["strategy"] == {"name": "acme-two:half", "power": 0.5}
    assert polyak.AveragerConfig.model_validate_json(config.model_dump_json()) == config


def test_a_built_in_name_cannot_be_replaced(site):
    distribute(site, "acme-ema", offering("ema", "Ours"))
    assert polyak.strategies()["ema"] is polyak.EMA
    assert type(polyak.average({"w": torch.ones(1)}, "ema").strategy) is polyak.EMA
    assert polyak.strategies()["acme-ema:ema"].__name__ == "Ours"
    assert repr(polyak.average({"w": torch.ones(1)}, "acme-ema:ema").strategy) == "Ours(name='ema', power=0.5)"
    assert type(polyak.average({"w": torch.ones(1)}, "polyak:ema").strategy) is polyak.EMA


def test_a_distribution_that_does_not_offer_the_name_is_an_unknown_name(site):
    distribute(site, "acme-half", offering("half"))
    with pytest.raises(polyak.UnknownStrategyError, match=r"no strategy is called 'acme-half:ema'.*Did you mean"):
        polyak.average({"w": torch.ones(1)}, "acme-half:ema")


def test_one_object_behind_two_entry_points_is_loaded_once(site):
    distribute(site, "acme-half", offering("half"), points="a = acme_half\nb = acme_half")
    names = Registry()
    fates = {p.name: p.error for p in names.plugins if p.distribution == "acme-half"}
    assert sorted(fates.values()) == ["", "another entry point has loaded it already"]
    assert names.strategies().distribution("half") == "acme-half"


def test_every_averager_tells_those_that_listen_of_averaged_updates_and_of_no_others(site):
    source = """
        import polyak
        told = []

        @polyak.hookimpl
        def polyak_updated(averager, clock):
            told.append((averager.n, averager.rate, clock.step))
    """
    distribute(site, "acme-listens", source)
    averager = polyak.average({"w": torch.ones(1)}, "swa", every=2)
    for _ in range(5):
        averager.update()
    assert sys.modules["acme_listens"].told == [(1, 1.0, 2), (2, 0.5, 4)]
    assert "acme-listens" in {plugin.distribution for plugin in registry().plugins}


def test_a_hook_may_leave_out_arguments(site):
    distribute(
        site,
        "acme-few",
        "import polyak\ntold = []\n@polyak.hookimpl\ndef polyak_updated(clock):\n    told.append(clock.n)",
    )
    polyak.average({"w": torch.ones(1)}, "ema").update()
    assert sys.modules["acme_few"].told == [1]


def test_an_exception_of_a_listener_reaches_the_caller_after_the_update(site):
    distribute(
        site, "acme-raises", "import polyak\n@polyak.hookimpl\ndef polyak_updated():\n    raise OSError('disk full')"
    )
    model = {"w": torch.zeros(1)}
    averager = polyak.average(model, "ema", decay=0.5)
    model["w"].fill_(1.0)
    with pytest.raises(OSError, match="disk full"):
        averager.update()
    assert averager.n == 1
    assert averager.averages["w"].item() == 0.5


class Own(polyak.Strategy):
    name: Literal["own"] = "own"

    def rate(self, clock):
        return 0.5


class Notebook:
    @polyak.hookimpl
    def polyak_strategies(self):
        return [Own]


def test_a_plugin_can_be_registered_for_the_process(site):
    registry().register(Notebook(), "my-notebook")
    assert polyak.strategies().distribution("own") == "my-notebook"
    assert type(polyak.average({"w": torch.ones(1)}, "own").strategy) is Own


def test_a_registered_plugin_that_cannot_be_used_raises_and_leaves_nothing(site):
    class Wrong:
        @polyak.hookimpl
        def polyak_strategies(self):
            return [Own, int]

    names = Registry([])
    with pytest.raises(polyak.PluginError, match=r"the plugin 'my-notebook' cannot be used: .*offers <class 'int'>"):
        names.register(Wrong(), "my-notebook")
    with pytest.raises(polyak.PluginError, match="unhashable"):
        names.register(SimpleNamespace(polyak_updated=polyak.hookimpl(lambda: None)), "my-notebook")
    assert list(names.strategies()) == BUILT_IN
    names.register(Notebook(), "my-notebook")
    assert "own" in names.strategies()


def _cell(power):
    class Rerun(polyak.Strategy):
        name: Literal["rerun"] = "rerun"
        share: float = power

        def rate(self, clock):
            return self.share

    class Cell:
        heard: ClassVar[list[int]] = []

        @polyak.hookimpl
        def polyak_strategies(self):
            return [Rerun]

        @polyak.hookimpl
        def polyak_updated(self, clock):
            self.heard.append(clock.n)

    return Cell()


def test_a_cell_that_runs_again_replaces_what_it_registered(site):
    first, second = _cell(0.25), _cell(0.5)
    registry().register(first, "my-notebook")
    registry().register(second, "my-notebook")
    registry().register(Notebook(), "another-notebook")
    averager = polyak.average({"w": torch.ones(1)}, "rerun")
    averager.update()
    assert averager.rate == 0.5
    assert (first.heard, second.heard) == ([], [1])
    assert "own" in polyak.strategies()


def test_a_cell_that_fails_leaves_what_it_registered_before(site):
    names = Registry([])
    names.register(_cell(0.25), "my-notebook")
    with pytest.raises(polyak.PluginError, match="implements no hook"):
        names.register(SimpleNamespace(), "my-notebook")
    assert names.resolve("rerun")().share == 0.25
    names.register(_cell(0.5), "my-notebook")
    assert names.resolve("rerun")().share == 0.5


def test_without_its_plugin_a_state_loads_and_only_the_next_update_raises(site):
    distribute(site, "acme-half", offering("half"))
    model = {"w": torch.zeros(2)}
    averager = polyak.average(model, "half", power=1.0)
    model["w"].fill_(4.0)
    averager.update()
    state = averager.state_dict()
    (site / "acme_half-1.0.dist-info" / "entry_points.txt").unlink()
    shared_registry.cache_clear()
    assert not entry_points(group="polyak", name="acme-half")
    loaded = polyak.average(model, "ema")
    loaded.load_state_dict(state)
    assert loaded.averages["w"].tolist() == [4.0, 4.0]
    with pytest.raises(polyak.UnknownStrategyError, match="the strategy 'half', which is not installed here"):
        loaded.update()
    assert loaded.averages["w"].tolist() == [4.0, 4.0]


def test_the_list_of_strategies_reads_as_a_list():
    assert repr(Registry([]).strategies()).startswith("<strategies: ema (polyak), ema_debiased (polyak)")
    assert len(Registry([]).strategies()) == len(BUILT_IN)


def test_a_plugin_may_build_a_config_while_it_is_imported(tmp_path):
    early = "import polyak\nCONFIG = polyak.AveragerConfig(strategy={'name': 'ema', 'decay': 0.5})\n"
    distribute(tmp_path, "acme-early", early + offering("early"))
    with installed(tmp_path):
        assert {"early", "ema", "byol"} <= {*polyak.strategies()}
        assert [plugin.error for plugin in registry().plugins] == [""] * len(registry().plugins)


def test_a_plugin_that_needs_its_own_name_while_it_is_imported_is_named_and_breaks_nothing(tmp_path):
    distribute(tmp_path, "acme-early", "import polyak\npolyak.AveragerConfig(strategy='early')\n" + offering("early"))
    with installed(tmp_path):
        assert "ema" in polyak.strategies()
        (failed,) = [plugin for plugin in registry().plugins if plugin.error]
        assert "no strategy is called 'early'" in failed.error
