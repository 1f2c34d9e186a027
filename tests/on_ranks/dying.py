"""A rank is killed again and again: each time the ranks that are left name it, and form a smaller group."""

from __future__ import annotations

import datetime as dt
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

import polyak
from on_ranks.models import built, fsdp, same

PATIENCE = 2  # seconds of the group whose rank is killed


def _update(averager, folder):
    averager.update()


def _save(averager, folder):
    polyak.distributed.save(averager, folder / "average")


def _load(averager, folder):
    polyak.distributed.load(averager, folder / "average")


def _applied(averager, folder):
    with averager.applied(), torch.no_grad():
        averager.model(torch.arange(6))


def _gather(averager, folder):
    averager.averaged_state_dict(full=True)


def _compare(averager, folder):
    polyak.distributed.verify_in_sync(averager)


def _dies(act, victim, folder):
    """Kill a rank by its number in the group that there is now; the others do something and look who is named."""
    model = fsdp(built()).eval()
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip", nonfinite="skip")
    averager.update()
    with torch.no_grad():
        model(torch.arange(6))
    model.reshard()
    live = [parameter.to_local().clone() for parameter in model.parameters()]
    held = {name: tensor.to_local().clone() for name, tensor in averager.averages.items()}
    _impatient()
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    # Rank 0 takes the store along, by which the others could tell more.
    words = {0: "rank 0 died, or stopped by an error"}
    whom = words.get(victim, rf": rank {victim} (is gone|does not answer: it died)")
    with pytest.raises(polyak.DistributedError, match=whom):
        act(averager, folder)
    assert averager.n == 1
    assert not averager.is_applied
    assert all(map(torch.equal, [parameter.to_local() for parameter in model.parameters()], live))
    same({name: tensor.to_local() for name, tensor in averager.averages.items()}, held)


def _impatient():
    dist.barrier()
    _set_pg_timeout(dt.timedelta(seconds=PATIENCE))
    _get_default_store().set_timeout(dt.timedelta(seconds=PATIENCE))


def _smaller(victim, port):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    patience = dt.timedelta(seconds=30)
    dist.init_process_group("gloo", rank=rank - (rank > victim), world_size=ranks - 1, timeout=patience)


def killed(rank, folder, acts, ports):
    """Of five ranks the one in the middle dies, of four the first, of three the last."""
    averager = polyak.average(fsdp(built()), "ema", decay=0.5, buffers="skip")
    averager.update()
    _save(averager, folder)
    for act, victim, port in zip(acts, (2, 0, 2), ports, strict=True):
        _dies(act, victim, folder)
        _smaller(victim, port)
    # What was written before is whole: another number of ranks reads it.
    averager = polyak.average(fsdp(built()), "ema", decay=0.5, buffers="skip")
    polyak.distributed.load(averager, folder / "average")
    assert averager.n == 1


def late(rank, folder):
    """Who is only late is not called dead, and learns that it was."""
    averager = polyak.average(fsdp(built()), "ema", decay=0.5, nonfinite="skip")
    _impatient()
    if rank:
        time.sleep(2.5 * PATIENCE)
        with pytest.raises(polyak.DistributedError, match="all ranks answered: one did not take part, or too late"):
            averager.update()
        _get_default_store().set("told", "")
    else:
        with pytest.raises(
            polyak.DistributedError, match="rank 1 does not answer: it died, hangs or did not take part"
        ):
            averager.update()
        _get_default_store().wait(["told"], dt.timedelta(seconds=30))
    assert averager.n == 0


def unwritten(rank, folder):
    """A rank dies before the last snapshot: none of it is written, and those before are whole."""
    averager = polyak.average(fsdp(built()), "ema", decay=0.5, buffers="skip")
    recorder = polyak.posthoc.Recorder(averager, folder, every=2, blocks=False)
    for _ in range(3):
        averager.update()
    dist.barrier()
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    _impatient()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(polyak.DistributedError, match=r"gather a snapshot: rank 1 (is gone|does not).*All ranks build"):
        recorder.close()
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before
    assert len(before) == 2  # the weights at the start, and the average at step 2


def unmeasured(rank, folder):
    """A rank dies before the statistics of batch norm are joined: the model has its own weights and statistics."""
    model = fsdp(built())
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    held = {name: getattr(t, "_local_tensor", t).clone() for name, t in averager.averages.items()}
    live = {name: getattr(t, "_local_tensor", t).clone() for name, t in model.state_dict().items()}

    def batches():
        yield torch.arange(6)
        _impatient()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        polyak.DistributedError, match=r"statistics of batch norm: rank 1 (is gone|does not).*All ranks"
    ):
        polyak.recalibrate(averager, batches())
    assert not averager.is_applied
    same({name: getattr(t, "_local_tensor", t) for name, t in averager.averages.items()}, held)
    same({name: getattr(t, "_local_tensor", t) for name, t in model.state_dict().items()}, live)


UPDATE, SAVE, APPLIED, OTHERS = [_update] * 3, [_save] * 3, [_applied] * 3, [_gather, _compare, _load]
EACH = [_update, _save, _applied]
