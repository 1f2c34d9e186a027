"""The strategies that are named after a library's, beside its real code."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from ema_pytorch.post_hoc_ema import KarrasEMA
from torch_ema import ExponentialMovingAverage

import polyak
from parity.race import NETWORKS, distance, floats, named_parameters, recorded

pytestmark = pytest.mark.parity


@pytest.fixture(params=NETWORKS)
def network(request):
    network = recorded(request.param)
    network.go_to(0)
    return network


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_ema_tf_equals_torch_ema(network, decay):
    theirs = ExponentialMovingAverage(network.module.parameters(), decay=decay)
    ours = polyak.average(network.module, "ema_tf", decay=decay)
    for _ in network.noisy_steps():
        theirs.update()
        ours.update()
    assert distance(named_parameters(network.module, theirs.shadow_params), ours.averages) <= 1e-6


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("after", [0, 20])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_ema_tf_that_follows_one_step_equals_diffusers(network, decay, after, foreach):
    theirs = EMAModel(network.module.parameters(), decay=decay, update_after_step=after, foreach=foreach)
    ours = polyak.average(network.module, "ema_tf", decay=decay, follow=after + 1)
    for _ in network.noisy_steps():
        theirs.step(network.module.parameters())
        ours.update()
        assert ours.rate == pytest.approx(1 - theirs.cur_decay_value, abs=1e-15)
    assert distance(named_parameters(network.module, theirs.shadow_params), ours.averages) <= 1e-6


@pytest.mark.parametrize("width", [{"sigma_rel": 0.05}, {"sigma_rel": 0.2}, {"gamma": 6.94}], ids=str)
def test_power_equals_ema_pytorchs_karras_ema_that_counts_its_first_step_twice(network, width):
    theirs = KarrasEMA(network.module, update_every=1, **width)
    ours = polyak.average(network.module, "power", **width)
    for step in network.noisy_steps():
        # It copies the first weights and then averages them as its second step.
        for _ in range(2 if step == 1 else 1):
            ours.update()
        theirs.update()
    assert distance(floats(theirs.ema_model.state_dict()), ours.averaged_state_dict()) <= 2e-6


def test_every_k_of_ema_pytorchs_karras_ema_is_another_width_and_ours_the_same():
    steps, every = 1000, 10
    line = torch.nn.Linear(1, steps + 1, bias=False).double()
    theirs = KarrasEMA(line, sigma_rel=0.05, update_every=every)
    ours = polyak.average(line, "power", sigma_rel=0.05, every=every)
    for step in range(1, steps + 1):
        with torch.no_grad():
            line.weight.zero_()[step] = 1.0
        theirs.update()
        ours.update()
    ages = torch.arange(steps, -1, -1.0, dtype=torch.float64)
    mean_ages = [
        float(ages @ weights.detach().squeeze()) / steps for weights in (theirs.ema_model.weight, ours.module.weight)
    ]
    assert mean_ages[0] == pytest.approx(1 - 0.642, abs=0.01)  # as measured on its code
    assert mean_ages[1] == pytest.approx(1 - 0.9473, abs=0.01)
