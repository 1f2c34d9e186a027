"""Updates on a GPU that look at the weights, in Triton's interpreter here and on a GPU with ``-m gpu``."""

from __future__ import annotations

import os

import pytest

import verdict_checks
from interpreted import results_of
from polyak.kernels.rounding import rounds_once
from verdict_checks import CHECKS, SKIPPED

pytest.importorskip("triton", minversion="3.4")  # as in tests/tensors/test_fused_cuda.py


@pytest.fixture(scope="module")
def interpreted():
    if not rounds_once() and "ATEN_CPU_CAPABILITY" not in os.environ:
        pytest.skip("torch rounds twice on this processor")
    return results_of(verdict_checks.__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert interpreted[check] == "", interpreted[check]


@pytest.mark.gpu
@pytest.mark.filterwarnings(f"ignore:{SKIPPED}:polyak.PolyakWarning")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    CHECKS[check]("cuda")
