"""`ema_v1`, `ema_v2` and `ema_v3` beside timm's own classes, on the same weights."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

import polyak

from .race import Network, distance, floats, ulps

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:after 300 updates the average is still:polyak.PolyakWarning"),
]

RATES = [
    {"use_warmup": use_warmup, "min_decay": min_decay, "update_after_step": update_after_step}
    for use_warmup, min_decay, update_after_step in product([False, True], [0.0, 0.7], [0, 20])
]


@pytest.mark.parametrize(("their_class", "name"), [(ModelEma, "ema_v1"), (ModelEmaV2, "ema_v2")], ids=["v1", "v2"])
def test_ema_v1_and_v2_equal_model_ema_and_v2(network: Network, their_class: Any, name: str):
    theirs = their_class(network.module, decay=0.9)
    ours = polyak.average(network.module, name, decay=0.9)

    for _ in network.noisy_steps():
        theirs.update(network.module)
        ours.update()

    assert distance(_floats(theirs), ours.averaged_state_dict()) <= 1e-6


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9998])
@pytest.mark.parametrize(("their_class", "name"), [(ModelEma, "ema_v1"), (ModelEmaV2, "ema_v2")], ids=["v1", "v2"])
def test_ema_v1_and_v2_equal_timm_at_every_decay_where_rounding_is_small(
    network64: Network, their_class: Any, name: str, decay: float
):
    theirs = their_class(network64.module, decay=decay)
    ours = polyak.average(network64.module, name, decay=decay)

    for _ in network64.noisy_steps():
        theirs.update(network64.module)
        ours.update()

    assert distance(_floats(theirs), ours.averaged_state_dict()) <= 1e-13


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("exclude_buffers", [False, True], ids=["buffers averaged", "buffers copied"])
def test_ema_v3_equals_model_ema_v3_in_every_setting_with_and_without_the_step(
    network: Network, exclude_buffers: bool, foreach: bool
):
    settings = [{"decay": 0.95, "exclude_buffers": exclude_buffers, "foreach": foreach, **rate} for rate in RATES]
    with_step, without_step = ([_v3_pair(network, each) for each in settings] for _ in range(2))

    for step in network.noisy_steps():
        for theirs, ours in with_step:
            theirs.update(network.module, step=step)
            ours.update(step=step)
        for each, (theirs, ours) in zip(settings, without_step, strict=True):
            # Without a step timm ignores these two settings (see test_timm_exceptions.py), so it is given the count.
            counted = {"step": step} if each["use_warmup"] or each["update_after_step"] else {}
            theirs.update(network.module, **counted)
            ours.update()

    bound = 0 if foreach else 2
    for each, pair in zip(settings * 2, with_step + without_step, strict=True):
        assert _apart(*pair) <= bound, each


def test_ema_v3_equals_model_ema_v3_at_every_single_update_where_the_step_jumps(network: Network):
    settings = {"decay": 0.95, "use_warmup": True, "warmup_gamma": 3.0, "warmup_power": 0.75, "update_after_step": 30}
    theirs, ours = _v3_pair(network, settings)

    for step in network.noisy_steps(60):
        theirs.update(network.module, step=7 * step)
        ours.update(step=7 * step)
        assert _apart(theirs, ours) == 0


def test_ema_v3_has_the_defaults_of_model_ema_v3(batch_norm: Network):
    theirs = ModelEmaV3(batch_norm.module)
    ours = polyak.EMAV3().model_dump(exclude={"name"})

    assert ours == {setting: getattr(theirs, setting) for setting in ours}


def _v3_pair(network: Network, settings: dict[str, Any]) -> tuple[ModelEmaV3, polyak.Averager]:
    return ModelEmaV3(network.module, **settings), polyak.average(network.module, "ema_v3", **settings)


def _apart(theirs: ModelEmaV3, ours: polyak.Averager) -> int:
    return ulps(theirs.module.state_dict(), ours.averaged_state_dict())


def _floats(theirs: Any) -> dict[str, Any]:
    return floats((theirs.ema if isinstance(theirs, ModelEma) else theirs.module).state_dict())
