"""What averaging costs each rank, counted: the bytes that are kept, that are moved, and that are written to disk."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import polyak
from polyak.engine.plan import plan
from polyak.kernels.cpu import loops as compiled
from polyak.planning.budget import Job, budget
from polyak.tensors.swap import in_force

WITHIN = 0.02
WRITTEN = {"aten::copy_", "aten::_foreach_copy_"}  # the others that write in place read what they write, too


class Counted(TorchDispatchMode):
    """Counts the bytes that torch's functions read and write, and those that the compiled loops are called for."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        schema = function._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not (writes and schema.name in WRITTEN)
            if not self._view(schema):
                self.bytes += (reads + writes) * sum(map(held, tensors(value)))
        if all(returned.alias_info is None for returned in schema.returns):
            self.bytes += sum(map(held, tensors(made)))
        return made

    @staticmethod
    def _view(schema):
        return any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def held(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


@contextmanager
def counted():
    """Count all bytes that are moved meanwhile, those of the compiled loops by the pieces that they are given."""
    move, finite, counter = compiled.move, compiled.all_finite, Counted()

    def moving(targets, sources, sizes, first, last, rates, seed, average, weight, hold, held, done):
        pieces, lanes = int(sizes[first:last].sum()), sum(rate != 1 for rate in rates)
        # A piece of the weights fits the cache, and is read from there for the lanes after the first.
        counter.bytes += pieces * (weight.itemsize + 2 * lanes * average.itemsize)
        return move(targets, sources, sizes, first, last, rates, seed, average, weight, hold, held, done)

    def checking(sources, sizes, first, last, mask):
        counter.bytes += int(sizes[first:last].sum()) * mask.itemsize
        return finite(sources, sizes, first, last, mask)

    with pytest.MonkeyPatch.context() as patch, counter:
        patch.setattr(compiled, "move", moving)
        patch.setattr(compiled, "all_finite", checking)
        yield counter


def built():
    torch.manual_seed(1)
    # Rows that no number of ranks divides, and biases, which are small.
    return nn.Sequential(nn.Embedding(4001, 512), nn.Linear(512, 1777), nn.LayerNorm(1777), nn.Linear(1777, 512))


def layouts():
    """Return the meshes of these ranks with how many replicas each has."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    yield init_device_mesh("cpu", (ranks,)), 1
    if ranks == 4:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")), 2


def sharded():
    for mesh, replicas in layouts():
        model = fully_shard(built(), mesh=mesh)
        params = sum(parameter.numel() for parameter in model.parameters())
        yield model, Job(params, ranks=dist.get_world_size(), replicas=replicas)


def close(got, wanted):
    assert got == pytest.approx(wanted, rel=WITHIN), f"{got} for {wanted} bytes: {got / wanted - 1:.2%}"


def the_averages_of_a_rank_take_what_is_planned(rank, folder):
    for model, job in sharded():
        for dtype in ("float32", "bfloat16"):
            averager = polyak.average(model, "ema", dtype=dtype)
            close(sum(map(held, averager.averages.values())), budget(job, dtype=dtype).averages)
        bank = polyak.bank(model, {"a": "ema", "b": {"name": "ema", "decay": 0.9}})
        kept = [tensor for name in bank for tensor in bank[name].averages.values()]
        assert len({held(tensor) and tensor.to_local().data_ptr() for tensor in kept}) == len(kept)
        close(sum(map(held, kept)), budget(job, averages=2).averages)


def an_update_moves_what_is_planned(rank, folder):
    for model, job in sharded():
        for nonfinite, checked in (("hold", False), ("propagate", False), ("skip", True)):
            settings = {"decay": 0.9, "nonfinite": nonfinite}
            # Kernels of plain torch hold in memory of the cache, which is counted here as any other.
            kernels = ["fused", *(["loop", "foreach"] if nonfinite != "hold" else [])]
            everyone = [
                *((polyak.average(model, "ema", kernel=k, **settings), {}) for k in kernels),
                (polyak.average(model, "ema", kernel="fused", dtype="bfloat16", **settings), {"dtype": "bfloat16"}),
                (polyak.bank(model, {n: {"strategy": "ema", **settings} for n in "ab"}), {"averages": 2}),
            ]
            for averager, options in everyone:
                averager.update()
                with counted() as counter:
                    averager.update()
                close(counter.bytes, budget(job, checked=checked, **options).moved)


def an_evaluation_moves_what_is_planned(rank, folder):
    for model, job in sharded():
        for dtype in ("float32", "bfloat16"):
            averager = polyak.average(model, "ema", dtype=dtype)
            averager.update()
            planned = budget(job, dtype=dtype)
            applied = averager.applied()
            with counted() as going_in:
                applied.__enter__()
            steps = [step for swap in in_force for step in swap._journal]
            aside = [step.own for step in steps if step.own is not None]
            with counted() as going_out:
                applied.__exit__(None, None, None)
            close(going_in.bytes, planned.exchange)
            assert going_out.bytes <= planned.exchange * (1 + WITHIN)
            close(sum(map(held, aside)), planned.aside)


def an_average_on_the_host_stages_and_moves_what_is_planned(rank, folder):
    """What would come from an accelerator comes from the CPU here, by the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "crosses", lambda average, live: True)
        for model, job in sharded():
            averager = polyak.average(model, "ema", decay=0.9, nonfinite="propagate")
            averager.update()
            averager.synchronize()
            planned, offload = budget(job, device="cpu", checked=False), averager.plan.offload
            close(sum(map(held, offload.staged)), planned.staging)
            with counted() as sending:
                offload._stage()
            close(sending.bytes, planned.sent * 2)  # read there, written here
            toward = polyak.Move("average", "weights", 0.1)
            with counted() as averaging:
                offload.moves.update([toward], averager.core.state.generators, lambda: None, "propagate")
            close(sending.bytes - planned.sent + averaging.bytes, planned.on_host)


def a_checkpoint_takes_what_is_planned(rank, folder):
    for number, (model, job) in enumerate(sharded()):
        place = Path(folder) / f"{job.ranks} ranks, {number}"
        polyak.distributed.save(polyak.average(model, "ema"), place)
        close(sum(file.stat().st_size for file in place.iterdir()), budget(job).saved)


def the_whole_average_takes_what_is_planned(rank, folder):
    for model, job in sharded():
        for dtype in ("float32", "bfloat16"):  # it comes in the dtype of the weights
            whole = polyak.average(model, "ema", dtype=dtype).averaged_state_dict(full=True)
            assert sum(map(held, whole.values())) == (0 if rank else budget(job, dtype=dtype).gathered)


ALL = [
    the_averages_of_a_rank_take_what_is_planned,
    an_update_moves_what_is_planned,
    an_evaluation_moves_what_is_planned,
    an_average_on_the_host_stages_and_moves_what_is_planned,
    a_checkpoint_takes_what_is_planned,
    the_whole_average_takes_what_is_planned,
]
