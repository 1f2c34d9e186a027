"""What all tests share: fixed seeds, one thread, and hypothesis without deadlines or chance."""

from __future__ import annotations

import faulthandler
import os
import threading

import pytest
import torch
from hypothesis import settings

from polyak.kernels.cpu import work_list

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile("exhaustive", deadline=None, max_examples=500, database=None, print_blob=True)
settings.load_profile("fixed")  # --hypothesis-profile=exhaustive comes later, and wins


def pytest_unconfigure():
    """End the process where a thread hangs that a test has started: Python would wait for it for ever."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for thread in others:
        if not thread.daemon:
            thread.join(30)
    if any(thread.is_alive() and not thread.daemon for thread in others):
        faulthandler.dump_traceback()
        os._exit(1)


@pytest.fixture(autouse=True)
def _same_for_everyone():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def many_slices(monkeypatch):
    """Small tensors are cut and shared among threads as large ones are; by whole vectors, as large ones are."""
    monkeypatch.setattr(work_list, "_PIECE", 16)
    monkeypatch.setattr(work_list, "_ALONE", 0)
    torch.set_num_threads(3)  # one again for the next test
