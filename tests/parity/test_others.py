"""Our strategies beside torch-ema, ema-pytorch and diffusers, with settings that mean the same."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch_ema import ExponentialMovingAverage

import polyak

from .race import Network, distance, floats, named_parameters

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:after 300 updates the average is still:polyak.PolyakWarning"),
]

WARM_UPS = [
    {"min_decay": 0.0, "update_after_step": 0, "power": 2 / 3},
    {"min_decay": 0.7, "update_after_step": 0, "power": 3 / 4},
    {"min_decay": 0.0, "update_after_step": 20, "power": 1.0},
    {"min_decay": 0.7, "update_after_step": 20, "power": 2 / 3},
]


def test_ema_equals_torch_ema(network: Network):
    theirs = ExponentialMovingAverage(network.module.parameters(), decay=0.99, use_num_updates=False)
    ours = polyak.average(network.module, "ema", decay=0.99)

    for _ in network.noisy_steps():
        theirs.update()
        ours.update()

    assert distance(named_parameters(network.module, theirs.shadow_params), ours.averages) <= 1e-6


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("settings", WARM_UPS, ids=str)
def test_the_warm_up_of_ema_v3_equals_that_of_diffusers(network: Network, settings: dict[str, Any], foreach: bool):
    theirs = EMAModel(
        network.module.parameters(), decay=0.95, use_ema_warmup=True, inv_gamma=2.0, foreach=foreach, **settings
    )
    ours = polyak.average(network.module, _v3(decay=0.95, gamma=2.0, **settings))

    for _ in network.noisy_steps():
        theirs.step(network.module.parameters())
        ours.update()

    assert distance(named_parameters(network.module, theirs.shadow_params), ours.averages) <= 1e-6


@pytest.mark.parametrize("settings", WARM_UPS, ids=str)
def test_the_warm_up_of_ema_v3_equals_that_of_ema_pytorch(network: Network, settings: dict[str, Any]):
    renamed = {"min_value": settings["min_decay"], "update_after_step": settings["update_after_step"]}
    theirs = EMA(
        network.module, beta=0.95, update_every=1, inv_gamma=2.0, power=settings["power"], use_foreach=True, **renamed
    )
    ours = polyak.average(network.module, _v3(decay=0.95, gamma=2.0, **settings))

    for _ in network.noisy_steps():
        theirs.update()
        ours.update()

    # Its decay is a float32 tensor: 1 - decay has lost up to 6e-8 / (1 - 0.95) of itself.
    assert distance(floats(theirs.ema_model.state_dict()), ours.averaged_state_dict()) <= 2e-6


def test_ema_from_the_first_update_equals_ema_pytorch_held_at_its_cap(network: Network):
    theirs = EMA(network.module, beta=0.95, min_value=0.95, update_after_step=0, update_every=1)
    ours = polyak.average(network.module, "ema", decay=0.95, origin="first")

    for _ in network.noisy_steps():
        theirs.update()
        ours.update()

    assert distance(floats(theirs.ema_model.state_dict()), ours.averaged_state_dict()) <= 2e-6


def test_swa_equals_ema_pytorch_with_power_one(network: Network):
    theirs = EMA(network.module, beta=1 - 1e-7, power=1.0, update_after_step=0, update_every=1)
    ours = polyak.average(network.module, "swa")

    for _ in network.noisy_steps():
        theirs.update()
        ours.update()

    assert distance(floats(theirs.ema_model.state_dict()), ours.averaged_state_dict()) <= 1e-5


def _v3(decay: float, gamma: float, min_decay: float, update_after_step: int, power: float) -> polyak.EMAV3:
    return polyak.EMAV3(
        decay=decay,
        min_decay=min_decay,
        update_after_step=update_after_step,
        use_warmup=True,
        warmup_gamma=gamma,
        warmup_power=power,
    )
