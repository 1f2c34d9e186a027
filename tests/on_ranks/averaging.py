"""What each rank checks of averages of sharded models."""

from __future__ import annotations

import pickle
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from on_ranks import models
from on_ranks.models import Net, bits, built, fsdp, same, trained, weights
from polyak.strategy import Move

ON_TWO = {
    "fsdp": fsdp,
    "kept": models.kept,
    "mixed": models.mixed,
    "checkpointed": models.checkpointed,
    "compiled": models.compiled,
    "compiled first": models.compiled_first,
}
ON_FOUR = {"hsdp": models.hsdp, "tp_fsdp": models.tp_fsdp}


def layouts():
    return ON_TWO if dist.get_world_size() == 2 else ON_FOUR


class Delayed(polyak.Strategy):
    """An average of the weights of the update before: a strategy with a slot."""

    name: Literal["delayed"] = "delayed"

    def rate(self, clock):
        return 0.25

    def slots(self):
        return ("before",)

    def moves(self, n, rate):
        return [Move("average", "before", rate), Move("before", "weights", 1.0)]

    def shares(self, rates):
        raise NotImplementedError


def every_layout_equals_the_recursion_in_float64(rank):
    for name, shard in layouts().items():
        model = shard(built())
        wide = polyak.average(model, "ema", decay=0.75, dtype="float64")
        delayed = polyak.average(model, Delayed(), dtype="float64")
        swa = polyak.average(model, "swa", every=2, dtype="float64")
        bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.75}, "b": "swa"}, every=1)
        kernels = {k: polyak.average(model, "ema", decay=0.75, kernel=k) for k in ("loop", "foreach", "auto")}
        seen = [weights(model)]
        everyone = (wide, delayed, swa, bank, *kernels.values())

        def update(step, model=model, seen=seen, all_of=everyone):
            for averager in all_of:
                averager.update(step=step)
            seen.append(weights(model))

        trained(model, 4, between=update)
        assert [*wide.averages] == [*weights(built())], name
        expected, late, before = seen[0], seen[0], seen[0]
        for new in seen[1:]:
            expected = {k: v + 0.25 * (new[k] - v) if "tracked" not in k else new[k] for k, v in expected.items()}
            late = {k: v + 0.25 * (before[k] - v) if "tracked" not in k else new[k] for k, v in late.items()}
            before = new
        mean = {k: (seen[2][k] + seen[4][k]) / 2 if "tracked" not in k else seen[4][k] for k in expected}
        for averager, wanted in ((wide, expected), (delayed, late), (swa, mean)):
            got = bits(averager)
            assert all(torch.allclose(got[k].double(), wanted[k], rtol=1e-13, atol=1e-14) for k in wanted), name
        for averager in (*kernels.values(), bank["a"]):
            same(bits(averager), bits(kernels["loop"]))
            got = bits(averager)
            assert all(torch.allclose(got[k].double(), expected[k], rtol=1e-6, atol=1e-7) for k in expected), name
        # Memory: the parts that this rank holds, and no more.
        held = sum(s.nbytes for s in wide.core.state.stored if s.spread)
        everything = sum(v.nbytes for k, v in expected.items() if wide.core.state.stored and "bn.running" not in k)
        assert held < 0.75 * everything


def training_with_evaluations_equals_training_without(rank):
    x = torch.arange(6)
    for name, shard in layouts().items():
        plain, watched = shard(built()), shard(built())
        trained(plain, 5)
        averager = polyak.average(watched, "ema", decay=0.5)
        alone = Net().eval()

        def evaluate(step, watched=watched, averager=averager, alone=alone, name=name):
            averager.update()
            watched.eval()
            with torch.no_grad():
                live = watched(x)
                with averager.applied():
                    averaged = watched(x).float()
                    assert averager.is_applied
                again = watched(x)
            watched.train()
            assert torch.equal(live, again), name
            full = averager.averaged_state_dict(full=True)
            assert (rank == 0) == bool(full)
            if full:
                alone.load_state_dict(full)
                wide = 0.1 if name == "mixed" else 1e-5
                assert torch.allclose(alone(x), averaged, atol=wide), name
                assert not torch.allclose(live.float(), averaged, atol=1e-3), name

        trained(watched, 5, between=evaluate)
        same(weights(plain), weights(watched))


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def an_update_communicates_at_most_one_byte(rank):
    shard = fsdp if dist.get_world_size() == 2 else models.hsdp
    dimensions = 1 if dist.get_world_size() == 2 else 2
    model = shard(built())
    for nonfinite, expected in (("hold", 0), ("propagate", 0), ("skip", dimensions), ("raise", dimensions)):
        averager = polyak.average(model, "ema", nonfinite=nonfinite)
        averager.update()
        with Collectives() as collectives:
            averager.update()
            with averager.applied():
                pass
        assert len(collectives.names) == expected, collectives.names


def all_ranks_decide_alike_about_weights_that_are_not_finite(rank):
    model = fsdp(built())
    skips, raises = (polyak.average(model, "ema", nonfinite=what) for what in ("skip", "raise"))
    slots = polyak.average(model, Delayed(), nonfinite="skip")
    bank = polyak.bank(model, {"a": "ema", "b": "swa"}, nonfinite="skip")
    before = bits(skips)
    last = dist.get_world_size() - 1
    if rank == last:
        model.up.weight._local_tensor.data[-1, 0] = torch.nan
    with pytest.warns(polyak.PolyakWarning, match=r"up\.weight" if rank == last else "of another rank"):
        skips.update()
    with pytest.raises(polyak.NonFiniteError, match=r"up\.weight" if rank == last else "of another rank"):
        raises.update()
    with pytest.warns(polyak.PolyakWarning):
        slots.update()
    with pytest.warns(polyak.PolyakWarning):
        bank.update()
    assert (skips.n, skips.skipped, raises.n, slots.skipped, bank["a"].skipped) == (0, 1, 0, 1, 1)
    same(bits(skips), before)


def a_rank_holds_its_own_elements_and_asks_no_other(rank):
    model = fsdp(built())
    before = bits(polyak.average(model, "ema"))
    held = {"ema": polyak.average(model, "ema"), "slots": polyak.average(model, Delayed())}
    last = dist.get_world_size() - 1
    if rank == last:
        model.up.weight._local_tensor.data[-1, 0] = torch.nan
    for averager in held.values():
        with Collectives() as collectives:
            if rank == last:
                with pytest.warns(polyak.PolyakWarning, match=r"1 of up\.weight"):
                    averager.update()
            else:
                averager.update()
        assert collectives.names == []
        assert averager.n == 1
        assert dict(averager.held) == ({"up.weight": 1} if rank == last else {})
        same(bits(averager), before)  # constant weights, and those that are held
        polyak.distributed.verify_in_sync(averager)


def replicas_round_alike_at_random(rank):
    for shard in layouts().values() if dist.get_world_size() == 4 else [fsdp]:
        for kernel in ("foreach", "auto"):
            model = shard(built())
            averager = polyak.average(model, "ema", decay=0.9, dtype="bfloat16", kernel=kernel, buffers="skip")
            trained(model, 3, between=lambda step, averager=averager: averager.update())
            polyak.distributed.verify_in_sync(averager)
            # And not by chance: another update rounds otherwise than the same one again.
            other = polyak.average(model, "ema", decay=0.9, dtype="bfloat16", kernel=kernel, buffers="skip")
            other.load_state_dict(averager.state_dict())
            averager.update()
            other.update()
            same(bits(averager), bits(other))
            mean = polyak.average({"w": model.up.weight}, "ema", decay=0.999, dtype="bfloat16", kernel=kernel)
            with torch.no_grad():
                model.up.weight.add_(0.01)
            for _ in range(300):
                mean.update()
            moved = weights(model)["up.weight"] - bits(mean)["w"].double()
            assert abs(float(moved.mean()) / 0.01 - 0.74) < 0.1  # rounded to the nearest it would be 1


def a_model_sharded_after_the_averager_was_built_is_refused(rank):
    model = built()
    averager = polyak.average(model, "ema", decay=0.5)
    before = bits(averager)
    fsdp(model)
    for use in (
        averager.update,
        averager.copy_to,
        averager.averaged_state_dict,
        lambda: averager.applied().__enter__(),
    ):
        with pytest.raises(polyak.MismatchError, match=r"(?s)DTensor.*after it was sharded"):
            use()
    assert averager.n == 0
    same({name: s.average for name, s in zip(before, averager.core.state.stored, strict=True)}, before)
    sharded = polyak.average(model, "ema", decay=0.5)
    held = bits(sharded)
    with pytest.raises(polyak.MismatchError, match=r"a whole tensor and was a DTensor"):
        sharded.update(built())
    with pytest.raises(polyak.MismatchError, match="whole tensor"):
        sharded.copy_to(built())
    with pytest.raises(polyak.MismatchError, match="spread otherwise"):
        sharded.update(fsdp(built(), mesh=models.init_device_mesh("cpu", (1, 2), mesh_dim_names=("copy", "shard"))))
    assert sharded.n == 0
    same(bits(sharded), held)


def what_cannot_be_had_of_shards_is_refused_with_the_way_out(rank):
    model = fsdp(built())
    averager = polyak.average(model, "ema", decay=0.5)
    with pytest.raises(polyak.ModelError, match="applied"):
        averager(torch.arange(6))
    with pytest.raises(polyak.StateError, match=r"polyak\.distributed\.save"):
        pickle.dumps(averager)
    with pytest.raises(polyak.ConfigError, match=r"polyak\.distributed\.save"):
        polyak.save(averager, "average.pt")
    state = averager.state_dict()
    with pytest.raises(polyak.StateError, match=r"bn.weight is a DTensor .* expected a whole tensor"):
        polyak.average(built(), "ema", decay=0.5).load_state_dict(state)
    assert "(9, 5)" in averager.describe()


def the_average_goes_into_sharded_models(rank):
    model = fsdp(built())
    averager = polyak.average(model, "ema", decay=0.5)
    trained(model, 2, between=lambda step: averager.update())
    other, third = fsdp(built(seed=5)), fsdp(built(seed=6))
    x = torch.arange(6)
    for one in (other, third):
        one.eval()
        with torch.no_grad():
            one(x)  # which leaves the root's parameters whole
    averager.copy_to(other)
    third.load_state_dict(averager.averaged_state_dict())
    assert all(
        isinstance(t, DTensor) for k, t in averager.averaged_state_dict().items() if "bn.r" not in k and "num" not in k
    )
    for one in (other, third):
        same({k: v.double() for k, v in bits(averager).items()}, weights(one))
    with torch.no_grad():
        assert torch.equal(other(x), third(x))


def applied_restores_whatever_happens(rank):
    x = torch.arange(6)
    for shard in (fsdp, models.kept):
        model = shard(built())
        averager = polyak.average(model, "ema", decay=0.5)
        # Before the first forward: FSDP2 may move its shards then.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        averager.update()
        start = weights(model)
        model.eval()
        with averager.applied(), torch.no_grad():
            first = model(x)
        same(weights(model), start)
        with torch.no_grad():
            live = model(x)
        assert not torch.allclose(live, first, atol=1e-3)
        # A gather under way brings the values of before.
        model.reshard()
        model.unshard(async_op=True)
        with averager.applied(), torch.no_grad():
            with averager.applied():
                assert torch.equal(model(x), first)
            model.reshard()
            model.unshard(async_op=True)
        with torch.no_grad():
            assert torch.equal(model(x), live)

        # An exception in the middle of the forward.
        def fail(*_):
            raise KeyError

        hook = model.gate.register_forward_hook(fail)
        with pytest.raises(KeyError), torch.no_grad(), averager.applied():
            model(x)
        hook.remove()
        same(weights(model), start)
        with torch.no_grad():
            assert torch.equal(model(x), live)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert gradients == [None] * len(gradients)


def a_state_resumes_exactly(rank):
    model = fsdp(built())
    averager = polyak.average(model, "swa")
    other = polyak.average(model, "swa")
    saved = []

    def update(step):
        averager.update()
        if step == 2:
            saved.append(averager.state_dict())
            other.load_state_dict(saved[0])
        elif step > 2:
            other.update()

    trained(model, 4, between=update)
    same(bits(averager), bits(other))
    assert (other.n, other.profile().shares.tolist()) == (4, averager.profile().shares.tolist())


def a_state_is_gathered_whole_and_loaded_in_any_layout(rank):
    model = fsdp(built())
    averager = polyak.average(model, Delayed(), dtype="float64")
    trained(model, 3, between=lambda step: averager.update())
    state = [averager.state_dict(full=True)]
    assert (state == [{}]) == (rank > 0)
    dist.broadcast_object_list(state)
    for layout in (fsdp, models.ddp, lambda model: model):
        other = polyak.average(layout(built()), Delayed(), dtype="float64")
        other.load_state_dict(state[0])
        assert other.n == 3
        for slot, tensors in averager.state_dict()["slots"].items():
            for name, tensor in tensors.items():
                assert torch.equal(models.whole(tensor), models.whole(other.state_dict()["slots"][slot][name]))
    one = polyak.average(built(), "swa")
    assert one.state_dict(full=True)["slots"].keys() == {"average"}


def a_mapping_of_dtensors_is_averaged(rank):
    model = fsdp(built())
    averager = polyak.average(dict(model.named_parameters()), "ema", decay=0.5)
    with torch.no_grad():
        model.up.weight.add_(1.0)
    before = bits(averager)["up.weight"]
    averager.update()
    assert torch.allclose(bits(averager)["up.weight"], before + 0.5)


def one_rank_is_enough_for_one_rank(rank):
    """A mesh of one rank: nobody to ask."""
    mesh = models.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copy", "shard"))
    model = models.fully_shard(nn.Linear(3, 2), mesh=mesh["shard"])
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    assert averager.n == 1


def statistics_are_measured_over_the_batches_of_all_ranks(rank):
    ranks = dist.get_world_size()
    batches = torch.randint(0, 7, (2 * ranks, 6), generator=torch.Generator().manual_seed(9))
    for exact in (False, True):
        for shard in layouts().values():
            model, alone = shard(built()), built()
            averager = polyak.average(model, "ema", decay=0.5)
            trained(model, 2, between=lambda step, averager=averager: averager.update())
            for parameter, averaged in zip(alone.parameters(), alone_of(averager, alone), strict=True):
                parameter.data.copy_(averaged)
            before, modes = weights(model), [module.training for module in model.modules()]
            # Ranks that are tensor parallel have the same data.
            each = 2 if shard is models.tp_fsdp else 1
            polyak.recalibrate(averager, batches[rank // each :: ranks // each], exact=exact)
            polyak.recalibrate(alone, batches, exact=exact)
            for name, buffer in alone.bn.named_buffers():
                wide = 0.02 if shard is models.mixed else 1e-5
                torch.testing.assert_close(averager.averages[f"bn.{name}"], buffer, rtol=wide, atol=wide)
            same(weights(model), before)
            assert [module.training for module in model.modules()] == modes
            told = [None] * ranks
            dist.all_gather_object(told, averager.averages["bn.running_var"].tolist())
            assert told == told[:1] * ranks
    model = fsdp(built())
    polyak.recalibrate(model, batches[rank::ranks])
    alone = built()
    polyak.recalibrate(alone, batches)
    torch.testing.assert_close(model.bn.running_mean, alone.bn.running_mean)
    with pytest.raises(polyak.ModelError, match=r"leaves .* out"):
        polyak.recalibrate(polyak.average(model, "ema", buffers="skip"), batches)


def evaluating_the_wrapper_of_ddp_writes_no_other_ranks_statistics(rank):
    for wrapped in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        model = wrapped(models.ddp(inner))
        averagers = [polyak.average(model, "ema", decay=0.5), polyak.average(inner, "ema", decay=0.5)]
        generator = torch.Generator().manual_seed(rank)
        for averager in averagers:
            model(torch.randn(8, 3, generator=generator)).sum().backward()
            averager.update(model)
        inner.eval()
        for averager in averagers:
            averaged, raw = bits(averager), weights(inner)
            with averager.applied(), torch.no_grad():
                model(torch.randn(8, 3, generator=generator))
            same(bits(averager), averaged)
            same(weights(inner), raw)
        inner.train()
        for _ in range(2):  # after one without gradients the first forward broadcasts nothing
            model(torch.ones(8, 3))
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, inner[1].running_mean.tolist())
        assert told == told[:1] * len(told)  # outside, a forward begins with rank 0's


def alone_of(averager, alone):
    averages = bits(averager)
    return [averages[name] for name, _ in alone.named_parameters()]


ALL = [
    every_layout_equals_the_recursion_in_float64,
    training_with_evaluations_equals_training_without,
    an_update_communicates_at_most_one_byte,
    all_ranks_decide_alike_about_weights_that_are_not_finite,
    a_rank_holds_its_own_elements_and_asks_no_other,
    replicas_round_alike_at_random,
    a_model_sharded_after_the_averager_was_built_is_refused,
    what_cannot_be_had_of_shards_is_refused_with_the_way_out,
    the_average_goes_into_sharded_models,
    applied_restores_whatever_happens,
    a_state_resumes_exactly,
    a_state_is_gathered_whole_and_loaded_in_any_layout,
    a_mapping_of_dtensors_is_averaged,
    one_rank_is_enough_for_one_rank,
    evaluating_the_wrapper_of_ddp_writes_no_other_ranks_statistics,
    statistics_are_measured_over_the_batches_of_all_ranks,
]
FOUR = ALL[:3] + ALL[4:5] + ALL[-1:]
