"""Memory is measured to about a megabyte."""

from __future__ import annotations

import pytest
import torch

from polyak.bench.memory import available, method, peak, use

CPU = torch.device("cpu")
MEBI = 1 << 20


def test_a_temporary_tensor_is_seen_at_its_peak_and_is_not_kept():
    def call():
        first = torch.empty(3 * MEBI, dtype=torch.uint8)
        del first
        torch.empty(5 * MEBI, dtype=torch.uint8)

    used = use(call, CPU)

    assert used is not None
    assert used.peak == pytest.approx(5 * MEBI, abs=MEBI / 4)
    assert used.kept == pytest.approx(0, abs=MEBI / 4)


def test_temporaries_inside_of_an_operation_are_seen():
    a = torch.ones(MEBI)
    assert peak(lambda: torch._foreach_sub_([a], torch._foreach_sub([a], [a])), CPU) == pytest.approx(
        4 * MEBI, abs=MEBI / 4
    )


def test_what_is_returned_is_kept_tensors_and_objects_of_python_alike():
    used = use(lambda: (torch.ones(MEBI, dtype=torch.float32), bytearray(2 * MEBI)), CPU)

    assert used is not None
    assert used.kept == pytest.approx(6 * MEBI, abs=MEBI / 4)


def test_how_it_was_measured_is_told():
    assert "profiler" in method(CPU)
    assert method(torch.device("meta")) == ""
    assert peak(lambda: None, torch.device("meta")) is None


def test_free_memory_is_known():
    free = available(CPU)
    assert free is None or free > MEBI
