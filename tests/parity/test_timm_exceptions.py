"""Where timm is wrong we differ from it on purpose: each test shows what timm does and what polyak does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn

import polyak

from .race import Network, distance, floats, ulps

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:after 300 updates the average is still:polyak.PolyakWarning"),
]

GENERATIONS = [
    pytest.param(ModelEma, "ema_v1", {}, id="v1"),
    pytest.param(ModelEmaV2, "ema_v2", {}, id="v2"),
    pytest.param(ModelEmaV3, "ema_v3", {"foreach": True}, id="v3 foreach"),
    pytest.param(ModelEmaV3, "ema_v3", {"foreach": False}, id="v3 loop"),
]


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.zeros_(self.embedding.weight)


class Buffers(nn.Module):
    """Two buffers that always hold the same values; one is not part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("transient", torch.zeros(2), persistent=False)


@pytest.mark.parametrize(("their_class", "name", "settings"), GENERATIONS)
def test_a_tied_tensor_is_moved_twice_by_timm_and_once_by_polyak(their_class: Any, name: str, settings: dict[str, Any]):
    model = Tied()
    theirs = their_class(model, decay=0.9, **settings)
    ours = polyak.average(model, name, decay=0.9, **settings)

    nn.init.ones_(model.embedding.weight)
    theirs.update(model)
    ours.update()

    torch.testing.assert_close(_module(theirs).embedding.weight.detach(), torch.full((3, 2), 0.19))
    for alias in ("embedding.weight", "head.weight"):
        torch.testing.assert_close(ours.averaged_state_dict()[alias], torch.full((3, 2), 0.10))


def test_a_tied_tensor_is_moved_once_by_timm_too_where_it_walks_the_parameters():
    model = Tied()
    theirs = ModelEmaV3(model, decay=0.9, exclude_buffers=True)
    ours = polyak.average(model, "ema_v3", decay=0.9, exclude_buffers=True)

    nn.init.ones_(model.embedding.weight)
    theirs.update(model)
    ours.update()

    assert ulps(theirs.module.state_dict(), ours.averaged_state_dict()) == 0


@pytest.mark.parametrize(("their_class", "name", "settings"), GENERATIONS[:2])
def test_an_integer_buffer_is_averaged_and_cut_off_by_timm_and_copied_by_polyak(
    batch_norm: Network, their_class: Any, name: str, settings: dict[str, Any]
):
    theirs = their_class(batch_norm.module, decay=0.9999, **settings)
    ours = polyak.average(batch_norm.module, name, decay=0.9999, **settings)

    for _ in batch_norm.noisy_steps(300):
        theirs.update(batch_norm.module)
        ours.update()

    assert _module(theirs)[1].num_batches_tracked.item() == 0
    assert ours.averaged_state_dict()["1.num_batches_tracked"].item() == 300


@pytest.mark.parametrize(("their_class", "name", "settings"), GENERATIONS)
def test_a_non_persistent_buffer_goes_stale_in_timm_and_is_averaged_by_polyak(
    their_class: Any, name: str, settings: dict[str, Any]
):
    model = Buffers()
    theirs = their_class(model, decay=0.9, **settings)
    ours = polyak.average(model, name, decay=0.9, **settings)

    for value in range(1, 6):
        for buffer in model.buffers():
            buffer.fill_(value)
        theirs.update(model)
        ours.update()

    assert torch.equal(_module(theirs).transient, torch.zeros(2))
    assert (_module(theirs).kept > 1).all()
    assert torch.equal(ours.averages["transient"], ours.averages["kept"])
    torch.testing.assert_close(ours.averages["transient"], _module(theirs).kept)


@pytest.mark.parametrize("ignored", [{"use_warmup": True}, {"update_after_step": 20}], ids=str)
def test_without_a_step_timm_ignores_warm_up_and_delay_and_polyak_counts_calls(
    network: Network, ignored: dict[str, Any]
):
    without_step, with_step = (ModelEmaV3(network.module, decay=0.95, **ignored) for _ in range(2))
    constant = ModelEmaV3(network.module, decay=0.95)
    ours = polyak.average(network.module, "ema_v3", decay=0.95, **ignored)

    for step in network.noisy_steps(100):
        without_step.update(network.module)
        constant.update(network.module)
        with_step.update(network.module, step=step)
        ours.update()

    expected = with_step.module.state_dict()
    assert ulps(constant.module.state_dict(), without_step.module.state_dict()) == 0
    assert ulps(expected, ours.averaged_state_dict()) == 0
    assert distance(floats(expected), without_step.module.state_dict()) > 1e-3


@pytest.mark.parametrize(("their_class", "name", "settings"), GENERATIONS[:2])
def test_in_float32_a_long_timm_average_drifts_and_polyak_follows_the_exact_one(
    network: Network, their_class: Any, name: str, settings: dict[str, Any]
):
    decay = 0.9998
    theirs = their_class(network.module, decay=decay, **settings)
    ours = polyak.average(network.module, name, decay=decay, **settings)
    exact = {key: tensor.detach().double() for key, tensor in floats(network.module.state_dict()).items()}

    for _ in network.noisy_steps():
        theirs.update(network.module)
        ours.update()
        for key, weight in network.module.state_dict().items():
            if key in exact:
                exact[key] = exact[key] + (1 - decay) * (weight.double() - exact[key])

    # In float32 0.9998 and 1 - 0.9998 add up to 1 + 2.6e-8, which timm multiplies by itself at every update.
    assert distance(exact, _module(theirs).state_dict()) >= 5e-6
    assert distance(exact, ours.averaged_state_dict()) <= 2e-6


@pytest.mark.filterwarnings("ignore:the weights have not changed:polyak.PolyakWarning")
@pytest.mark.parametrize(("their_class", "name", "settings"), GENERATIONS[:2])
def test_constant_weights_drift_in_timm_and_stay_bit_for_bit_in_polyak(
    network: Network, their_class: Any, name: str, settings: dict[str, Any]
):
    theirs = their_class(network.module, decay=0.9998, **settings)
    ours = polyak.average(network.module, name, decay=0.9998, **settings)

    for _ in range(300):
        theirs.update(network.module)
        ours.update()

    weights = network.module.state_dict()
    assert distance(floats(weights), _module(theirs).state_dict()) >= 5e-6
    assert ulps(weights, ours.averaged_state_dict()) == 0


def _module(theirs: Any) -> Any:
    return theirs.ema if isinstance(theirs, ModelEma) else theirs.module
