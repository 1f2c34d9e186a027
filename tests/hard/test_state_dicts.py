"""The averaged state dict: copies, one for all names of a tensor, whatever the model's own state dict looks like."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import polyak
from models import Tied


def moved(model, **options):
    """Return an averager after one update that moved it halfway from zeros to ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        averager = polyak.average(model, "ema", decay=0.5, **options)
        for parameter in model.parameters():
            parameter.fill_(1.0)
    averager.update()
    return averager


def size(state):
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


def tied_by_memory():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 4), "head": nn.Linear(4, 50, bias=False)})
    model["head"].weight.data = model["embedding"].weight.data
    return model


@pytest.mark.parametrize("build", [Tied, tied_by_memory])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"include": "head.*"}, {"exclude": "head.*"}])
def test_a_tied_model_is_saved_no_larger_than_its_own_state_dict(build, options):
    model = build()
    if "exclude" in options:
        model.extra = nn.Linear(1, 1)  # what is left alone is tied, too
    averager = moved(model, **options)
    saved = averager.averaged_state_dict()
    assert size(saved) < 1.1 * size(model.state_dict()) + 200
    (head,) = (name for name in saved if name.startswith("head"))
    (embedding,) = (name for name in saved if name.startswith("emb"))
    assert saved[head].data_ptr() == saved[embedding].data_ptr()
    saved[head].fill_(7.0)
    assert averager.averaged_state_dict()[head].max() < 2.0


def test_the_average_is_put_into_the_model_only_for_what_is_computed_from_its_weights(monkeypatch):
    averager = moved(Tied())
    monkeypatch.setattr(type(averager), "applied", None)
    assert len(averager.averaged_state_dict()) == len(Tied().state_dict())


def test_two_views_of_one_memory_that_differ_have_a_copy_each():
    model = {"whole": torch.ones(4), "start": torch.ones(1)}
    model["start"] = model["whole"][:1]
    saved = polyak.average(model, "ema").averaged_state_dict()
    assert [tuple(tensor.shape) for tensor in saved.values()] == [(4,), (1,)]


class Plain(nn.Linear):
    """A layer whose own state dict takes no arguments."""

    def state_dict(self):
        return {key: tensor.detach() for key, tensor in super().state_dict(keep_vars=True).items()}


class Deaf(nn.Linear):
    """A layer whose own state dict takes arguments and ignores them."""

    def state_dict(self, *_, **__):
        return super().state_dict()


class Nested(nn.Module):
    """A model whose own state dict has parts."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    def state_dict(self):
        parts = {"body": self.body.state_dict(), "head": [self.head.weight.detach(), self.head.bias.detach()]}
        return {**parts, "scale": 3, "doubled": 2 * self.head.weight}


@pytest.mark.parametrize("kind", [Plain, Deaf])
def test_a_models_own_state_dict_is_called_as_it_can_be(kind):
    saved = moved(kind(2, 1)).averaged_state_dict()
    assert {key: tensor.flatten().tolist() for key, tensor in saved.items()} == {"weight": [0.5, 0.5], "bias": [0.5]}


def test_a_state_dict_with_parts_holds_averages_in_all_of_them():
    model = Nested()
    saved = moved(model).averaged_state_dict()
    assert saved["scale"] == 3
    assert saved["doubled"].tolist() == [[1.0, 1.0]]
    assert not saved["doubled"].requires_grad
    assert [tensor.flatten().tolist() for tensor in saved["head"]] == [[0.5, 0.5], [0.5]]
    assert saved["body"]["weight"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert saved["body"]._metadata  # which load_state_dict() reads
    assert model.body.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    assert memory.isdisjoint(tensor.data_ptr() for tensor in (*saved["head"], *saved["body"].values()))


def test_extra_state_is_kept_and_its_tensors_are_copies():
    class Extra(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)
            self.scales = {"amax": torch.ones(2)}

        def get_extra_state(self):
            return self.scales

        def set_extra_state(self, state):
            self.scales = state

    model = Extra()
    saved = moved(model).averaged_state_dict()
    model.scales["amax"].fill_(9.0)
    assert saved["_extra_state"]["amax"].tolist() == [1.0, 1.0]
    Extra().load_state_dict(saved)
