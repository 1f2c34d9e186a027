"""Work on the threads that torch computes with: all of them take part, errors come back, and a fork has its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch

import polyak
from models import average_bits, drifting
from polyak.kernels import openmp

pytestmark = pytest.mark.skipif(openmp._parallel() is None, reason="torch computes with another OpenMP here, or none")


def test_each_thread_does_the_work_once():
    for threads in (1, 2, 3):
        seen = []
        barrier = threading.Barrier(threads)

        def work(barrier=barrier, seen=seen):
            barrier.wait(20)  # so many run at the same time
            seen.append(threading.get_ident())

        assert openmp.on_team(work, threads)
        assert len({*seen}) == threads
        assert threading.get_ident() in seen


def test_an_error_on_any_thread_is_raised_when_all_have_finished():
    finished = []
    barrier = threading.Barrier(2)

    def work():
        if barrier.wait(20) == 0:
            raise MemoryError
        time.sleep(0.05)
        finished.append(True)

    with pytest.raises(MemoryError):
        openmp.on_team(work, 2)
    assert finished


def test_ctrl_c_meanwhile_is_raised_behind_the_region():
    def work():
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        openmp.on_team(work, 2)


def test_large_averages_are_the_same_on_any_number_of_threads():
    torch.manual_seed(0)
    model = torch.nn.Linear(1500, 1000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(0.1)
            averager = polyak.average(model, "ema", decay=0.9, kernel="fused")
            for _ in drifting(model, 3, seed=1):
                averager.update()
            found.append(average_bits(averager))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_does_not_wait_for_the_parents_threads():
    openmp.on_team(lambda: None, 2)
    child = os.fork()
    if not child:
        os._exit(0 if not openmp.on_team(lambda: None, 2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_the_library_other_threads_do_the_work(monkeypatch):
    monkeypatch.setattr(openmp, "_FORKED", [True])
    assert not openmp.on_team(lambda: None, 2)
    if sys.platform == "linux":
        monkeypatch.setattr(sys, "platform", "elsewhere")
        assert openmp._parallel.__wrapped__() is None
