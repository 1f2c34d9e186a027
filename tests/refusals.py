"""What tests of refused input share: a message is short and says what to do, and nothing changed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

import polyak
from models import average_bits, drifting, mlp


def everything(averager):
    state = averager.state_dict()
    del state["slots"]
    return average_bits(averager), repr(state)


@contextmanager
def refused(averager, error, *words):
    """Expect an error whose message holds all of ``words``, and an averager that is as before."""
    before = everything(averager)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert everything(averager) == before


def used(model, strategy="ema", steps=2, **options):
    averager = polyak.average(model, strategy, **options)
    for _ in drifting(model, steps):
        averager.update()
    return averager


# Calls in another order, with other arguments, or of names that other libraries have


def averager_of():
    return polyak.average(mlp(), "ema", decay=0.9)


def bank_of():
    return polyak.bank(mlp(), {"short": "ema", "mean": "swa"})
