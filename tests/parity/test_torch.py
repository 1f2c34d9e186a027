"""`swa` and `ema` beside `torch.optim.swa_utils`, and `ema_debiased` beside its formula, on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import polyak

from .race import Network, distance, floats, ulps

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:after 300 updates the average is still:polyak.PolyakWarning"),
]


@pytest.mark.parametrize(
    "options", [{}, {"multi_avg_fn": get_swa_multi_avg_fn()}], ids=["default", "get_swa_multi_avg_fn"]
)
def test_swa_equals_averaged_model(network: Network, options: dict[str, Any]):
    theirs = AveragedModel(network.module, **options)
    ours = polyak.average(network.module, "swa", buffers="copy")

    for _ in network.noisy_steps():
        theirs.update_parameters(network.module)
        ours.update()

    # torch computes 1/n in float32, polyak in float64: the rate itself differs by a rounding.
    assert distance(theirs.module.state_dict(), ours.averaged_state_dict()) <= 1e-6


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_ema_from_the_first_update_equals_averaged_model_bit_for_bit(network: Network, decay: float):
    theirs = AveragedModel(network.module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ours = polyak.average(network.module, "ema", decay=decay, origin="first", buffers="copy")

    for _ in network.noisy_steps():
        theirs.update_parameters(network.module)
        ours.update()

    assert ulps(theirs.module.state_dict(), ours.averaged_state_dict()) == 0


def test_with_averaged_buffers_torch_cuts_integers_off_and_polyak_copies_them(batch_norm: Network):
    theirs = AveragedModel(batch_norm.module, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    ours = polyak.average(batch_norm.module, "ema", decay=0.9999, origin="first")

    for _ in batch_norm.noisy_steps(300):
        theirs.update_parameters(batch_norm.module)
        ours.update()

    averaged = ours.averaged_state_dict()
    assert ulps(floats(theirs.module.state_dict()), floats(averaged)) == 0
    assert theirs.module[1].num_batches_tracked.item() == 1
    assert averaged["1.num_batches_tracked"].item() == 300


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-13), ("float32", 1e-6)])
def test_ema_debiased_equals_the_zero_started_average_divided_by_its_mass(network: Network, dtype: str, bound: float):
    decay = 0.98
    ours = polyak.average(network.module, "ema_debiased", decay=decay, dtype=dtype)
    from_zero = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in network.module.named_parameters()}

    for t in network.noisy_steps():
        ours.update()
        for name, parameter in network.module.named_parameters():
            from_zero[name] = decay * from_zero[name] + (1 - decay) * parameter.detach().double()
        expected = {name: v / (1 - decay**t) for name, v in from_zero.items()}
        assert distance(expected, ours.averages) <= bound
