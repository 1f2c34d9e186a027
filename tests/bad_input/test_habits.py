"""What people write by habit from other libraries is answered with its name here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from models import mlp
from polyak.errors.formatting import shown
from refusals import averager_of, bank_of

# Names and habits from other libraries

HABITS = [
    ("ema", {"momentum": 0.1}, "Did you mean 'decay', the part that is kept (1 minus"),
    ("ema", {"alpha": 0.1}, "Did you mean 'decay'"),
    ("ema", {"beta": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"ema_decay": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"decay_rate": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"tau": 0.9}, "Did you mean 'decay'"),
    ("ema", {"gamma": 0.9}, "Did you mean 'decay'?"),
    ("ema", {"half_life": 100}, "'ema_halflife'"),
    ("ema", {"power": 0.75}, "'power' (gamma=)"),
    ("ema", {"sigma_rel": 0.1}, "a setting of 'power'"),
    ("ema", {"warmup": True}, "'ema_debiased'"),
    ("ema", {"debias": True}, "'ema_debiased'"),
    ("ema_v3", {"warmup": True}, "Did you mean 'use_warmup'?"),
    ("ema_v3", {"inv_gamma": 1.0}, "Did you mean 'warmup_gamma'?"),
    ("ema_v3", {"power": 0.75}, "Did you mean 'warmup_power'?"),
    ("ema_halflife", {"halflife": 5, "half_life": 100}, "Did you mean 'halflife'?"),
    ("swa", {"decay": 0.9}, "It has no decay"),
    ("swa", {"swa_start": 10}, "Did you mean 'start'?"),
    ("swa", {"k": 10}, "'lawa' (window=)"),
    ("lawa", {"window_size": 10}, "Did you mean 'window'?"),
    ("ema", {"update_every": 10}, "Did you mean 'every'?"),
    ("ema", {"use_buffers": True}, 'Did you mean \'buffers\', "average", "copy" or "skip"?'),
    ("ema", {"avg_fn": None}, "derive from polyak.Strategy"),
    ("ema", {"multi_avg_fn": None}, "derive from polyak.Strategy"),
]


@pytest.mark.parametrize(("strategy", "settings", "hint"), HABITS, ids=[f"{s}-{[*w][-1]}" for s, w, _ in HABITS])
def test_a_setting_of_another_library_is_answered_with_its_name_here(strategy, settings, hint):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), strategy, **settings)
    assert hint in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 300


def test_a_strategy_made_directly_knows_the_same_habits_and_sends_options_to_average():
    for settings, hint in (
        ({"momentum": 0.1}, "Did you mean 'decay'"),
        ({"update_every": 10}, "Did you mean 'every'? It is an option of the averager"),
        ({"every": 10}, "'every' is an option of the averager"),
        ({"decya": 0.5}, "Did you mean 'decay'?"),
    ):
        with pytest.raises(polyak.ConfigError) as caught:
            polyak.EMA(**settings)
        assert hint in str(caught.value)


# Arguments that changed places

SWAPPED = [
    lambda model: polyak.average("ema", model),
    lambda model: polyak.average(polyak.EMA(), model),
    lambda model: polyak.average({"name": "ema"}, dict(model.state_dict())),
    lambda model: polyak.bank({"a": "ema"}, model),
]


@pytest.mark.parametrize("call", SWAPPED)
def test_swapped_arguments_are_asked_about_without_printing_a_model(call):
    with pytest.raises(polyak.ArgumentError) as caught:
        call(nn.Sequential(*[nn.Linear(3, 3) for _ in range(100)]))
    assert "are the arguments swapped?" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), [nn.Linear(2, 2)], torch.ones(10_000), {"a": mlp()}], ids=shown)
def test_what_is_no_strategy_is_named_in_short(wrong):
    with pytest.raises(polyak.ConfigError) as caught:
        polyak.average(mlp(), wrong)
    assert len(str(caught.value)) < 300


def test_average_and_check_strategy_take_the_same_things():
    from polyak.testing import check_strategy

    for strategy, settings in (
        ("ema", {"decay": 0.5}),
        (polyak.EMA, {"decay": 0.5}),
        ({"name": "ema"}, {"decay": 0.5}),
        (polyak.EMA(decay=0.5), {}),
    ):
        assert polyak.average(mlp(), strategy, **settings).strategy == polyak.EMA(decay=0.5)
        check_strategy(strategy, **settings)
    for wrong in (None, 3, ["ema"], nn.Linear):
        for call in (check_strategy, lambda value: polyak.average(mlp(), value)):
            with pytest.raises(polyak.ArgumentError, match="a strategy is a name"):
                call(wrong)


# Messages that lead to what was meant


MEANT = {
    "an option inside a mapping": (
        lambda: polyak.AveragerConfig(strategy={"name": "ema", "every": 10}),
        ["strategy.every", "'every' is an option of the averager: move it out of 'strategy'"],
    ),
    "a strategy of a model": (lambda: polyak.EMA(mlp(), decay=0.9), ["polyak.average(model, polyak.EMA(...))"]),
    "no settings": (lambda: polyak.SWA(5), ["got 5", "It has no settings: SWA()"]),
    "a config by position": (lambda: polyak.AveragerConfig("ema"), ["Write strategy=..."]),
    "a config of a model": (lambda: polyak.AveragerConfig(mlp()), ["config.build(model)"]),
    "a class of modules": (lambda: polyak.average(nn.Linear), ["got the class Linear"]),
    "a whole checkpoint": (
        lambda: averager_of().load_state_dict({"averager": averager_of().state_dict(), "model": mlp().state_dict()}),
        ["Pass checkpoint['averager']"],
    ),
    "a whole checkpoint for a bank": (
        lambda: bank_of().load_state_dict({"averages": bank_of().state_dict()}),
        ["Pass checkpoint['averages']"],
    ),
    "a path as a state": (lambda: averager_of().load_state_dict("average.pt"), ["polyak.load(averager, path)"]),
    "weights as a state": (lambda: averager_of().load_state_dict(mlp().state_dict()), ["model.load_state_dict()"]),
    "buffers as a flag": (lambda: polyak.average(mlp(), buffers=True), ["got True", "'average', 'copy', 'skip'"]),
    "a function as globs": (lambda: polyak.average(mlp(), include=len), ["include", "a name or a glob", "no function"]),
    "a new strategy": (lambda: setattr(averager_of(), "strategy", polyak.SWA()), ["build a new one"]),
    "a new count": (lambda: setattr(averager_of(), "n", 5), ["'n' cannot be set; it can only be read"]),
    "a setting of the strategy": (lambda: averager_of().decay, ["averager.strategy.decay"]),
    "an average of a bank": (lambda: bank_of().short, ["bank['short']"]),
    "a config file": (lambda: polyak.average(mlp(), "average.toml"), ["the config file 'average.toml' cannot be read"]),
    "an optimiser": (lambda: polyak.average(mlp(), "lookahead"), ["which no strategy does"]),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_message_leads_to_what_was_meant(case):
    call, words = MEANT[case]
    with pytest.raises(polyak.PolyakError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).count("buffers:") < 2


OTHER_NAMES = {
    "exponential": "ema",
    "exponential_moving_average": "ema",
    "model_ema": "ema",
    "mean": "swa",
    "polyak": "swa",
    "karras": "power",
    "ModelEmaV3": "ema_v3",
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_strategys_name_elsewhere_names_ours(name):
    with pytest.raises(polyak.UnknownStrategyError, match=f"Did you mean '{OTHER_NAMES[name]}'"):
        polyak.average(mlp(), name)
