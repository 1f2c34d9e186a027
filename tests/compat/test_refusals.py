"""What the stand-ins refuse, by errors that are polyak's and of the library's kind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import polyak
from polyak.compat.diffusers import EMAModel
from polyak.compat.ema_pytorch import EMA
from polyak.compat.timm import ModelEmaV2, ModelEmaV3
from polyak.compat.torch import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from polyak.compat.torch_ema import ExponentialMovingAverage


def refused(error, call, says):
    with pytest.raises(polyak.PolyakError, match=says) as caught:
        call()
    assert isinstance(caught.value, error)


def model():
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("error", "call", "says"),
    [
        (AssertionError, lambda: AveragedModel(model(), None, get_ema_avg_fn(), get_ema_multi_avg_fn()), "got both"),
        (ValueError, lambda: ExponentialMovingAverage(model().parameters(), 1.5), "between 0 and 1"),
        (RuntimeError, lambda: ExponentialMovingAverage(model().parameters(), 0.9).restore(), "no `store"),
        (RuntimeError, lambda: EMAModel(model().parameters()).restore([]), "no `store"),
        (ValueError, lambda: EMAModel(model().parameters()).save_pretrained("folder"), "model_cls"),
        (ValueError, lambda: EMAModel(model().parameters()).load_state_dict({"decay": 2.0}), "between 0 and 1"),
        (ValueError, lambda: EMAModel(model().parameters()).load_state_dict({"min_decay": 1}), "Invalid min_decay"),
        (ValueError, lambda: EMAModel(model().parameters()).load_state_dict({"shadow_params": [1]}), "Tensors"),
        (ValueError, lambda: EMAModel(model().parameters()).step(nn.Linear(2, 2, bias=False).parameters()), "got 1"),
        (ValueError, lambda: EMAModel(model().parameters()).step(nn.Linear(2, 2).parameters()), "has shape"),
        (ValueError, lambda: ModelEmaV2(model()).update(nn.Linear(2, 2)), "weight"),
        (ValueError, lambda: ModelEmaV3(model()).update(nn.Sequential(model()), step=3), "weight"),
    ],
)
def test_wrong_arguments(error, call, says):
    refused(error, call, says)


def test_a_model_of_another_kind_is_refused_and_nothing_moves():
    averaged = AveragedModel(model())
    before = averaged.module.weight.clone()
    refused(ValueError, lambda: averaged.update_parameters(nn.Linear(2, 2)), "weight")
    assert torch.equal(averaged.module.weight, before)
    assert averaged.n_averaged == 0


@pytest.mark.parametrize(
    "function", [lambda average, weight, n: average * weight, lambda average, weight, n: 2 * average - weight]
)
def test_functions_that_are_no_average_are_refused(function):
    averaged, live = AveragedModel(model(), avg_fn=function), model()
    averaged.update_parameters(live)
    refused(ValueError, lambda: averaged.update_parameters(live), "the averaging function makes")
    assert averaged.n_averaged == 1


def test_lost_parameters_are_named_until_others_are_given():
    live = model()
    ema = ExponentialMovingAverage(live.parameters(), 0.9)
    ema.update()
    del live
    gc.collect()
    refused(ValueError, ema.update, "no longer exists")
    ema.update(model().parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_updates": "1"}, "num_updates"),
        ({"shadow_params": "weights"}, "shadow_params"),
        ({"collected_params": [1, 2]}, "collected_params"),
        ({"collected_params": []}, "different lengths"),
    ],
)
def test_a_damaged_state_of_torch_ema_is_refused_whole(change, says):
    ema = ExponentialMovingAverage(model().parameters(), 0.9)
    before = ema.state_dict()
    refused(AssertionError, lambda: ema.load_state_dict({**before, "decay": 0.5, **change}), says)
    assert ema.decay == 0.9


def test_a_model_that_cannot_be_copied_raises_and_does_not_end_the_process():
    live = model()
    live.generator = (number for number in range(3))
    refused(ValueError, lambda: EMA(live), "cannot be copied")
    refused(ValueError, lambda: EMA(nn.LazyLinear(3)), "cannot be copied")


def test_timms_warm_up_without_a_step_is_warned_of_once():
    live = model()
    ema = ModelEmaV3(live, use_warmup=True)
    with pytest.warns(polyak.PolyakWarning, match="give step="):
        ema.update(live)
    ema.update(live)


def test_names_of_older_releases_are_understood():
    with pytest.warns(FutureWarning, match="decay="):
        ema = EMAModel(model().parameters(), max_value=0.5)
    assert ema.decay == 0.5


def test_nan_in_the_weights_is_held():
    live = model()
    ema, averaged = ModelEmaV3(live, decay=0.5), AveragedModel(live)
    with torch.no_grad():
        live.weight[0, 0] = torch.nan
    with pytest.warns(polyak.PolyakWarning, match="would not be finite"):
        ema.update(live)
    with pytest.warns(polyak.PolyakWarning, match="would not be finite"):
        averaged.update_parameters(live)
    assert ema.module.weight.isfinite().all()
    assert averaged.module.weight.isfinite().all()
