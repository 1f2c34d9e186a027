"""Stored tensors find their entries by name or by order, and any mismatch is loud."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import polyak
from models import average_bits


def _weights(names, value=0.0):
    return {name: torch.full((2,), value) for name in names}


NAMES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)


@pytest.mark.property
@given(built=NAMES, given_=NAMES, data=st.data())
def test_by_name_any_order_is_right_and_any_other_set_of_names_is_refused(built, given_, data):
    averager = polyak.average(_weights(built), "ema", decay=0.5, match="name")
    model = {name: torch.full((2,), float(ord(name))) for name in data.draw(st.permutations(given_))}
    before = average_bits(averager)
    if set(built) == set(given_):
        averager.update(model)
        assert all(torch.equal(t, torch.full((2,), ord(n) / 2)) for n, t in averager.averages.items())
        return
    with pytest.raises(polyak.MismatchError) as caught:
        averager.update(model)
    assert all(f"missing: {name}" in str(caught.value) for name in set(built) - set(given_))
    assert all(f"new: {name}" in str(caught.value) for name in (set(given_) - set(built)))
    assert average_bits(averager) == before


@pytest.mark.property
@given(built=NAMES, given_=NAMES)
def test_by_order_known_names_must_keep_their_order(built, given_):
    averager = polyak.average(_weights(built), "ema", decay=0.5, match="order")
    right = built == given_ or (set(built).isdisjoint(given_) and len(built) == len(given_))
    if right:
        averager.update(_weights(given_, 1.0))
        assert all(torch.equal(t, torch.full((2,), 0.5)) for t in averager.averages.values())
        assert list(averager.averages) == built
    else:
        before = average_bits(averager)
        with pytest.raises(polyak.MismatchError):
            averager.update(_weights(given_, 1.0))
        assert average_bits(averager) == before


def test_a_long_list_of_problems_is_cut():
    averager = polyak.average(_weights([f"w{i}" for i in range(50)]))
    with pytest.raises(polyak.MismatchError, match="… and 94 more") as caught:
        averager.update(_weights([f"v{i}" for i in range(50)]))
    assert len(str(caught.value)) < 1000


def test_a_tie_made_later_goes_on_with_the_average_of_the_survivor():
    model = nn.ModuleDict({"emb": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    averager = polyak.average(model, "ema", decay=0.5)
    with torch.no_grad():
        model["emb"].weight.fill_(2.0)
        model["head"].weight.fill_(8.0)
    averager.update()
    survivor = averager.averages["head.weight"].clone()
    model["emb"].weight = model["head"].weight
    averager.update()
    assert list(averager.averages) == ["emb.weight"]
    assert torch.equal(averager.averages["emb.weight"], (survivor + 8.0) / 2)
    assert averager.module["emb"].weight is averager.module["head"].weight


def test_a_tie_broken_later_goes_on_with_one_average_each():
    model = nn.ModuleDict({"emb": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["emb"].weight
    averager = polyak.average(model, "ema", decay=0.5)
    with torch.no_grad():
        model["emb"].weight.fill_(2.0)
    averager.update()
    shared = averager.averages["emb.weight"].clone()
    model["head"].weight = nn.Parameter(torch.full((3, 2), 8.0))
    averager.update()
    assert torch.equal(averager.averages["emb.weight"], (shared + 2.0) / 2)
    assert torch.equal(averager.averages["head.weight"], (shared + 8.0) / 2)


def test_a_tie_broken_under_inference_mode_can_be_updated_outside_of_it():
    model = nn.ModuleDict({"emb": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["emb"].weight
    averager = polyak.average(model, "ema", decay=0.5)
    model["head"].weight = nn.Parameter(model["emb"].weight.detach().clone())
    with torch.inference_mode():
        averager.update()
    averager.update()
    assert averager.n == 2


def test_ties_by_memory_are_followed_when_made_and_when_broken():
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    model[1].weight.data = model[0].weight.data
    averager.update()
    assert list(averager.averages) == ["0.weight"]
    model[1].weight.data = torch.full((2, 2), 8.0)
    averager.update()
    assert list(averager.averages) == ["0.weight", "1.weight"]
    assert not torch.equal(averager.averages["0.weight"], averager.averages["1.weight"])


def test_a_model_that_is_only_written_to_may_be_tied_otherwise():
    untied = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    averager = polyak.average(untied, "ema", decay=0.5)
    before = average_bits(averager)
    tied = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    tied[1].weight = tied[0].weight
    averager.copy_to(tied)
    assert average_bits(averager) == before
    assert torch.equal(tied[0].weight, averager.averages["0.weight"])
    averager.update()
    assert average_bits(averager).keys() == before.keys()
