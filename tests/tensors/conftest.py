"""Fixtures of these tests."""

from __future__ import annotations

import pytest

from polyak.tensors import located


@pytest.fixture(params=["auto", "foreach", "no guard"])
def kernel(request, monkeypatch):
    if request.param != "no guard":
        return request.param
    monkeypatch.setattr(located, "_guard", lambda tensors: located._refuses)  # as where torch has none
    return "auto"
