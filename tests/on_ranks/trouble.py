"""What ranks see of ranks that disagree, or die."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import polyak
from on_ranks import models
from on_ranks.models import built, fsdp, trained


def ddp_averages_are_alike_and_told_apart(rank, folder):
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), broadcast_buffers=False)
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip")
    statistics = polyak.average(model, "ema", decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        averager.update()
        statistics.update()
    polyak.distributed.verify_in_sync(averager)
    with pytest.raises(polyak.DistributedError, match=r"1\.running_mean: rank 1 not as rank 0"):
        polyak.distributed.verify_in_sync(statistics)
    polyak.distributed.broadcast(statistics, source=1)
    polyak.distributed.verify_in_sync(statistics)
    assert statistics.n == 3


def shards_are_compared_with_their_replicas_only(rank, folder):
    averager = polyak.average(fsdp(built()), "ema", buffers="skip")
    polyak.distributed.verify_in_sync(averager)
    pair = models.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copy", "shard"))
    averager = polyak.average(fsdp(built(), mesh=pair), "ema", buffers="skip")
    polyak.distributed.verify_in_sync(averager)
    if rank == 1:
        averager.averages["up.weight"]._local_tensor[0, 0] += 1
    with pytest.raises(polyak.DistributedError, match=r"up\.weight: rank 1 not as rank 0"):
        polyak.distributed.verify_in_sync(averager)
    with pytest.raises(polyak.ModelError, match="nothing to broadcast"):
        polyak.distributed.broadcast(averager)


def ranks_that_made_it_otherwise_are_named(rank, folder):
    model = built()
    averager = polyak.average(model, "ema" if rank else "swa")
    with pytest.raises(polyak.DistributedError, match=r"(?s)strategy: .*SWA.* on rank 0; .*EMA.* on rank 1"):
        polyak.distributed.verify_in_sync(averager)
    averager = polyak.average(model, "ema")
    averager.update()
    if rank:
        averager.update()
    with pytest.raises(polyak.DistributedError, match=r"updates: 1 on rank 0; 2 on rank 1"):
        polyak.distributed.verify_in_sync(averager)
    # As many updates, but other ones.
    averager = polyak.average(model, "ema")
    averager.update(step=3 + rank)
    with pytest.raises(polyak.DistributedError, match=r"last step: 3 on rank 0; 4 on rank 1"):
        polyak.distributed.verify_in_sync(averager)


def averages_of_a_bank_are_compared_each(rank, folder):
    bank = polyak.bank(built(), {"a": "ema", "b": "swa"})
    bank.update()
    polyak.distributed.verify_in_sync(bank)
    if rank:
        bank["b"].averages["up.bias"][2] += 1
    with pytest.raises(polyak.DistributedError, match=r"up\.bias: rank 1 not as rank 0"):
        polyak.distributed.verify_in_sync(bank)


def averages_of_different_moments_are_not_saved_as_one(rank, folder):
    averager, place = polyak.average(fsdp(built()), "swa", nonfinite="propagate"), Path(folder) / "mixed"
    for _ in range(rank + 1):
        averager.update()
    with pytest.raises(polyak.DistributedError, match=r"updates: 1 on rank 0; 2 on rank 1"):
        polyak.distributed.save(averager, place)
    bank = polyak.bank(fsdp(built()), {"a": {"name": "ema", "nonfinite": "propagate"}})
    if rank:
        bank.update()
    with pytest.raises(polyak.DistributedError, match=r"a updates: 0 on rank 0; 1 on rank 1"):
        polyak.distributed.save(bank, place)
    assert not place.exists()


def a_folder_that_holds_more_than_averages_is_kept_and_every_rank_is_told(rank, folder):
    averager, place = polyak.average(fsdp(built()), "ema"), Path(folder) / "foreign"
    if rank == 0:
        place.mkdir()
        (place / "notes.txt").write_text("kept")
    dist.barrier()
    with pytest.raises(polyak.DistributedError, match=r"rank 0 could not prepare .*'notes\.txt', which is no average"):
        polyak.distributed.save(averager, place)
    assert (place / "notes.txt").read_text() == "kept"


def one_rank_may_average_for_all(rank, folder):
    """Under DDP all ranks have the same weights: one of them averages, the others take it over to evaluate."""
    model = DistributedDataParallel(built())
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip")
    trained(model, 3, between=lambda step: None if rank else averager.update())
    assert averager.n == (0 if rank else 3)
    polyak.distributed.broadcast(averager)
    polyak.distributed.verify_in_sync(averager)
    assert averager.n == 3


def fsdp1_is_refused_with_the_way_out(rank, folder):
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(polyak.ModelError, match=r"FSDP1.*fully_shard"):
        polyak.average(model, "ema")


def a_folder_that_one_rank_cannot_see_is_refused_by_all(rank, folder):
    averager = polyak.average(fsdp(built()), "ema", decay=0.5)
    place = Path(folder) / "seen"
    polyak.distributed.save(averager, place)
    averager.update()
    dist.barrier()
    with pytest.raises(polyak.StateError, match=r"rank 1.*no such folder"):
        polyak.distributed.load(averager, place if rank == 0 else Path(folder) / "unseen")
    assert averager.n == 1


def a_file_of_one_rank_is_refused_by_another_which_holds_other_parts(rank, folder):
    # Even shards: by their shapes nobody could tell.
    layer = nn.Linear(4, 2 * dist.get_world_size(), bias=False)
    averager = polyak.average(fully_shard(layer), "swa")
    for _ in range(2):
        averager.update()
    torch.save(averager.state_dict(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    other = torch.load(Path(folder) / f"{1 - rank}.pt", weights_only=False)
    before = averager.averages["weight"].to_local().clone()
    with pytest.raises(
        polyak.StateError, match=rf"the part at \({1 - rank},\) of the mesh, expected that at \({rank},\)"
    ):
        averager.load_state_dict(other)
    assert torch.equal(averager.averages["weight"].to_local(), before)
    averager.load_state_dict(torch.load(Path(folder) / f"{rank}.pt", weights_only=False))
    dist.barrier()
    # Replicas hold the same.
    pair = models.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copy", "shard"))
    averager = polyak.average(fully_shard(nn.Linear(4, 2, bias=False), mesh=pair), "swa")
    torch.save(averager.state_dict(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    averager.load_state_dict(torch.load(Path(folder) / f"{1 - rank}.pt", weights_only=False))


def a_rank_outside_the_mesh_of_a_tensor_loads_its_own_state(rank, folder):
    model = nn.Module()
    for name, mesh in (("a", models.world()), ("b", DeviceMesh("cpu", [0]))):
        setattr(model, name, nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])))
    averager = polyak.average(model, "swa")
    averager.update()
    state = averager.state_dict()
    averager.update()
    averager.load_state_dict(state)
    assert averager.n == 1


ALL = [
    ddp_averages_are_alike_and_told_apart,
    shards_are_compared_with_their_replicas_only,
    ranks_that_made_it_otherwise_are_named,
    averages_of_a_bank_are_compared_each,
    averages_of_different_moments_are_not_saved_as_one,
    a_folder_that_holds_more_than_averages_is_kept_and_every_rank_is_told,
    one_rank_may_average_for_all,
    fsdp1_is_refused_with_the_way_out,
    a_folder_that_one_rank_cannot_see_is_refused_by_all,
    a_file_of_one_rank_is_refused_by_another_which_holds_other_parts,
    a_rank_outside_the_mesh_of_a_tensor_loads_its_own_state,
]
