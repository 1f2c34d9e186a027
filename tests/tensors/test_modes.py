"""What surrounds the work on tensors: no autograd, no inference mode, no collection of cycles, and all as before."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch

from polyak.tensors.collector import collector_paused
from polyak.tensors.modes import Untracked


def _work(*, fails):
    with Untracked():
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        weight = torch.ones(2, requires_grad=True)
        assert not (weight * 2).requires_grad
        assert not (weight * 2).is_inference()
        if fails:
            raise KeyboardInterrupt


def _pause():
    with collector_paused():
        assert not gc.isenabled()
        raise KeyboardInterrupt


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_untracked_is_outside_of_every_mode_and_restores_it(around, fails):
    with around():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            _work(fails=fails)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_paused_and_then_as_it_was(on):
    was_on = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(KeyboardInterrupt):
            _pause()
        assert gc.isenabled() == on
    finally:
        (gc.enable if was_on else gc.disable)()
