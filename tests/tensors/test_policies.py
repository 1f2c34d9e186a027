"""What an update does with each entry: average, copy, or leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import polyak
from models import ZOO, Buffers, Conv, Tied, drifting
from polyak.tensors import policies, walk


def _by_name(model, **options):
    entries = walk(model)
    return dict(zip((entry.name for entry in entries), policies(entries, **options), strict=True))


def test_floats_are_averaged_and_the_rest_is_copied():
    chosen = _by_name(Buffers())
    assert chosen == {
        "running": "average", "count": "copy", "flags": "copy", "transient": "average", "mask": "copy",
        "expanded": "average", "linear.weight": "average", "linear.bias": "average",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "vectors"), [("spectral", ("_u", "_v")), ("old_spectral", ("weight_u", "weight_v"))])
def test_the_vectors_of_a_power_iteration_are_copied_and_keep_unit_norm(kind, vectors):
    model = ZOO[kind].build()
    averager = polyak.average(model, "ema", decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        averager.update()
    for name, average in averager.averages.items():
        if name.endswith(vectors):
            assert torch.allclose(average.norm(), torch.tensor(1.0))
    assert len([name for name in averager.averages if name.endswith(vectors)]) == 2


def test_the_parameter_weight_v_of_the_old_weight_norm_is_averaged():
    assert _by_name(ZOO["old_weight_norm"].build())["0.weight_v"] == "average"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_buffer_with_infinities_by_design_is_copied(value):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, value]))
    assert _by_name(model)["mask"] == "copy"
    assert _by_name(model, buffers="average")["mask"] == "average"


def test_a_statistic_that_turns_infinite_later_stays_averaged():
    model = Conv()
    averager = polyak.average(model, "ema", decay=0.5)
    model.norm.running_mean.fill_(torch.inf)
    model.extra = nn.Identity()  # makes the model be walked again
    with pytest.warns(polyak.PolyakWarning, match=r"norm\.running_mean"):
        averager.update()
    assert averager.averages["norm.running_mean"].isfinite().all()
    assert averager.held == {"norm.running_mean": len(model.norm.running_mean)}


@pytest.mark.parametrize("wanted", ["average", "copy", "skip"])
def test_one_word_decides_for_all_buffers(wanted):
    chosen = _by_name(Conv(), buffers=wanted)
    assert {chosen[f"norm.{name}"] for name in ("running_mean", "running_var")} == {wanted}
    assert chosen["norm.num_batches_tracked"] == ("copy" if wanted == "average" else wanted)
    assert chosen["norm.weight"] == chosen["conv.weight"] == "average"


def test_globs_decide_for_some_buffers_and_the_first_one_counts():
    chosen = _by_name(Conv(), buffers={"*.running_var": "copy", "*.running_*": "skip"})
    assert (chosen["norm.running_var"], chosen["norm.running_mean"]) == ("copy", "skip")
    assert chosen["norm.num_batches_tracked"] == "copy"


def test_include_and_exclude_leave_the_rest_alone():
    chosen = _by_name(Conv(), include=["conv.*", "head.*"], exclude="*.bias")
    assert {name for name, policy in chosen.items() if policy != "skip"} == {"conv.weight", "head.weight"}


def test_a_glob_that_matches_any_name_of_a_tied_tensor_matches_it():
    assert _by_name(Tied(), exclude="head.*")["emb.weight"] == "skip"
    assert _by_name(Tied(), include="head.weight")["emb.weight"] == "average"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused_unless_allowed(option):
    entries = walk(Conv())
    with pytest.raises(polyak.ConfigError, match="matches none"):
        policies(entries, **{option: "nowhere.*"})
    assert len(policies(entries, strict=False, **{option: "nowhere.*"})) == len(entries)


def test_what_is_excluded_is_never_touched():
    model = Conv()
    averager = polyak.average(model, "ema", decay=0.5, exclude=["head.*"])
    for _ in drifting(model, 2):
        averager.update()
    own = model.head.weight.detach().clone()
    assert not any(name.startswith("head") for name in averager.averages)
    with averager.applied():
        assert torch.equal(model.head.weight, own)
    assert torch.equal(averager.averaged_state_dict()["head.weight"], own)
    assert torch.equal(averager.module.head.weight, own)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_names_of_a_wrapped_model_are_understood(wrap):
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(requires_grad=False), nn.Linear(2, 2))
    names = [name for name, parameter in wrap(model).named_parameters() if parameter.requires_grad]
    for root in (model, wrap(model)):
        assert [*polyak.average(root, "ema", include=names).averages] == ["1.weight", "1.bias"]
    assert [*polyak.average(model, "ema", exclude=names).averages] == ["0.weight", "0.bias"]


def test_a_glob_may_have_the_prefixes_of_wrappers():
    chosen = _by_name(Conv(), include="_orig_mod.module.conv.*", buffers={"module.norm.running_*": "copy"})
    assert {name for name, policy in chosen.items() if policy != "skip"} == {"conv.weight", "conv.bias"}


def test_wrappers_inside_a_model_change_no_name_in_a_pattern():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert [*polyak.average(model, "ema", include=["0._orig_mod.weight"]).averages] == ["0.weight"]


def test_a_submodule_that_is_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "weight": nn.Linear(2, 2)})
    assert [*polyak.average(model, "ema", include="module.weight").averages] == ["module.weight"]
    assert [*polyak.average(model, "ema", include="module.module.bias").averages] == ["module.bias"]


def test_a_name_with_brackets_is_a_name_before_it_is_a_glob():
    model = nn.ModuleDict({"block[0]": nn.Linear(2, 2), "block0": nn.Linear(2, 2), "block[1]": nn.Linear(2, 2)})

    def included(pattern):
        return [*polyak.average(model, "ema", include=pattern).averages]

    assert included("block[0].weight") == ["block[0].weight"]
    assert included("block[0].*") == ["block0.weight", "block0.bias"]
    assert included("block[1].*") == ["block[1].weight", "block[1].bias"]


def test_pruning_masks_are_copied_and_the_average_is_sparse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.2)
    prune.random_unstructured(model[2], "bias", amount=1)
    averager = polyak.average(model, "ema", decay=0.9)
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # again: torch registers another mask
    averager.update()
    for model_mask, name in ((model[0].weight_mask, "0.weight_mask"), (model[2].bias_mask, "2.bias_mask")):
        assert torch.equal(averager.averages[name], model_mask)
    averager(torch.randn(3, 20))
    assert not averager.module[0].weight[model[0].weight_mask == 0].any()


def test_masks_of_torch_ao_pruning_are_copied():
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(8, 8))
    sparsifier = WeightNormSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    averager = polyak.average(model, "ema", decay=0.9)
    sparsifier.step()
    averager.update()
    mask = averager.averages["0.parametrizations.weight.0.mask"]
    assert set(mask.unique().tolist()) == {0.0, 1.0}


def test_zeros_and_ones_that_no_pruning_registered_are_averaged():
    model = nn.Linear(2, 2)
    model.register_buffer("weight_mask", torch.tensor([0.0, 1.0]))
    assert _by_name(model)["weight_mask"] == "average"
