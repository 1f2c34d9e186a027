"""The walk: every distinct tensor once, with its name, kind, aliases and places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import ZOO, Buffers, Shapes, Tied, mlp, tensors_of
from polyak.tensors import unwrap, walk


def _names(model):
    return [(entry.name, entry.kind) for entry in walk(model)]


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_every_tensor_is_listed_once_with_every_name(kind):
    model = kind.build()
    entries = walk(model)
    assert {name for entry in entries for name in entry.aliases} == set(tensors_of(model))
    assert len({id(entry.tensor) for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.aliases[0] == entry.name
        assert [location.name for location in entry.locations] == [*entry.aliases]
        for location in entry.locations:
            assert getattr(location.owner, location.key) is location.tensor
            assert model.get_submodule(location.name.rpartition(".")[0]) is location.owner


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_the_order_is_that_of_the_state_dict(kind):
    model = kind.build()
    persistent = [name for entry in walk(model) for name in entry.aliases if entry.persistent]
    listed = [name for name in model.state_dict() if not name.endswith("_extra_state")]
    first = {entry.name for entry in walk(model)}
    assert [name for name in listed if name in first] == [name for name in persistent if name in first]


def test_kinds_and_persistence_are_told_apart():
    entries = {entry.name: entry for entry in walk(Buffers())}
    assert entries["linear.weight"].kind == "parameter"
    assert entries["flags"].kind == entries["transient"].kind == "buffer"
    assert entries["flags"].persistent
    assert not entries["transient"].persistent
    assert "nothing" not in entries


def test_a_tied_tensor_is_one_entry():
    entries = {entry.name: entry for entry in walk(Tied())}
    assert entries["emb.weight"].aliases == ("emb.weight", "head.weight")
    assert "head.weight" not in entries


def test_two_parameters_over_the_same_memory_are_one_entry():
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    model[1].weight.data = model[0].weight.data
    assert [entry.aliases for entry in walk(model)] == [("0.weight", "1.weight"), ("2.weight",)]


def test_three_names_of_one_tensor_are_one_entry():
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    model[1].weight = model[0].weight
    model[2].weight.data = model[0].weight.data
    assert [entry.aliases for entry in walk(model)] == [("0.weight", "1.weight", "2.weight")]


def test_views_that_only_overlap_are_entries_of_their_own():
    names = [name for name, _ in _names(Shapes())]
    assert {"left", "right"} <= set(names)


@pytest.mark.parametrize("other", [lambda t: t.t(), lambda t: t.view(-1), lambda t: t.view(torch.int32)])
def test_other_layouts_of_the_same_memory_are_no_tie(other):
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("seen", other(model.weight.detach()))
    assert [entry.aliases for entry in walk(model)] == [("weight",), ("seen",)]


def test_empty_and_freed_tensors_are_no_ties():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.empty(0, 2)), nn.Parameter(torch.empty(0, 2))
    model.c, model.d = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for freed in (model.c, model.d):
        freed.untyped_storage().resize_(0)
    assert len(walk(model)) == 4


def test_a_module_used_twice_has_both_names():
    entries = {entry.name: entry.aliases for entry in walk(Shapes())}
    assert entries["first.weight"] == ("first.weight", "second.weight")
    assert entries["first.bias"] == ("first.bias", "second.bias")


def test_wrappers_change_no_name():
    model = mlp()
    plain = _names(model)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert _names(wrapped) == plain
    assert unwrap(wrapped) is model
    assert [entry.tensor for entry in walk(wrapped)] == [*model.parameters()]


def test_a_class_that_only_bears_a_wrappers_name_is_none():
    class DataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert [name for name, _ in _names(DataParallel())] == ["module.weight", "module.bias"]


def test_a_subclass_of_a_wrapper_is_one():
    class Mine(nn.DataParallel):
        pass

    assert [name for name, _ in _names(Mine(nn.Linear(2, 2)))] == ["weight", "bias"]


def test_a_mapping_is_a_model_and_its_floating_tensors_are_parameters():
    named = {
        "w": torch.ones(2),
        "z": torch.ones(1, dtype=torch.complex64),
        "n": torch.tensor(1),
        "b": torch.tensor(True),
    }
    assert _names(named) == [("w", "parameter"), ("z", "parameter"), ("n", "buffer"), ("b", "buffer")]
    named["tied"] = named["w"]
    assert walk(named)[0].aliases == ("w", "tied")


def test_a_walk_changes_nothing():
    model = Buffers()
    before = {name: (id(tensor), tensor._version) for name, tensor in model.named_buffers()}
    walk(model)
    assert {name: (id(tensor), tensor._version) for name, tensor in model.named_buffers()} == before


def test_power_iterations_are_known_for_what_they_are():
    for kind, wanted in {
        "spectral": {"_u", "_v"},
        "old_spectral": {"weight_u", "weight_v"},
        "old_weight_norm": set(),
    }.items():
        entries = walk(ZOO[kind].build())
        assert {entry.name.rpartition(".")[2] for entry in entries if entry.verbatim} == wanted
