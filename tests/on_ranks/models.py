"""Models, shardings and oracles of the tests on several ranks; importable by the processes they start."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    """Uneven shards (7, 9, 5), empty ones (a single row), a tied weight, and batch norm with its buffers."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.up = nn.Linear(5, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 5)
        self.gate = nn.Linear(5, 1)
        self.bn = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        h = self.bn(self.down(torch.relu(self.norm(self.up(self.emb(x))))))
        return self.head(h * torch.sigmoid(self.gate(h)))


def built(seed=1):
    torch.manual_seed(seed)
    return Net()


def world():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp(model, *, mesh=None, **options):
    mesh = mesh or world()
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def hsdp(model):
    return fsdp(model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard")))


def tp_fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    # 9 rows over 2 ranks: uneven, too; the norm between them takes the whole.
    plan = {"up": ColwiseParallel(output_layouts=_replicate()), "down": RowwiseParallel(input_layouts=_replicate())}
    parallelize_module(model, mesh["tp"], plan)
    return fsdp(model, mesh=mesh["dp"])


def _replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


def mixed(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=world(), mp_policy=policy)
    return fully_shard(model, mesh=world())  # CPUs have no batch norm of mixed dtypes


def checkpointed(model):
    model.up = checkpoint_wrapper(model.up)
    return fsdp(model)


def compiled(model):
    return torch.compile(fsdp(model), backend="eager")


def compiled_first(model):
    return fully_shard(torch.compile(model, backend="eager"), mesh=world())


def kept(model):
    return fsdp(model, reshard_after_forward=False)


def ddp(model):
    return DistributedDataParallel(model)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model, steps, *, seed=3, between=lambda step: None):
    """Train on batches that are the same on all ranks, so that a single process computes the same, almost."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        x = torch.randint(0, 7, (6,), generator=generator)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        between(step)


def weights(model):
    """Return all tensors of a model, whole, in float64, by their canonical names."""
    from polyak.tensors.sharding.adapter import adapter_for
    from polyak.tensors.wrappers import root_of

    root = root_of(model)
    entries = adapter_for(root).entries(root)
    return {entry.name: whole(entry.locations[0].tensor.detach()).double().clone() for entry in entries}


def bits(averager):
    return {name: whole(tensor).clone() for name, tensor in averager.averages.items()}


def same(one, other):
    assert one.keys() == other.keys()
    wrong = [name for name in one if not torch.equal(one[name], other[name])]
    assert not wrong, wrong


def twin(model):
    return copy.deepcopy(model)
