"""What each rank checks of recorders of sharded averages."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

import polyak
from on_ranks.averaging import layouts
from on_ranks.models import bits, built, ddp, fsdp, same, trained, weights


def a_recorder_writes_whole_tensors_once_and_any_average_can_be_made_of_them(rank, folder):
    for name, shard in layouts().items():
        model, here = shard(built()), folder / name
        bank = polyak.bank(model, {"ema": {"name": "ema", "decay": 0.9}, "power": {"name": "power", "sigma_rel": 0.2}})
        tail = polyak.average(model, "swa", start=7)
        with polyak.posthoc.Recorder(bank, here, every=3):
            trained(model, 12, between=lambda step, bank=bank, tail=tail: (bank.update(), tail.update(step=step)))
        wanted = tail.averaged_state_dict(full=True)
        if rank == 0:
            assert len([*here.glob("*.safetensors")]) == 1 + 3 * 4, name
            made = polyak.posthoc.synthesize(here, "swa", start=7)
            assert made.profile_error < 1e-12
            assert {*made.state_dict} == {*wanted}, (name, {*made.state_dict} ^ {*wanted})
            for key, tensor in made.state_dict.items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-6)


def what_rank_0_cannot_do_is_told_by_every_rank_and_training_goes_on(rank, folder):
    model = fsdp(built())
    averager = polyak.average(model, "ema", decay=0.5)
    other = polyak.average(model, "ema", decay=0.5)
    first, second = folder / "fsdp" / "nested", folder / "broken"
    with polyak.posthoc.Recorder(averager, first, every=2):
        trained(model, 2, between=lambda step: averager.update())
    again = polyak.posthoc.Recorder(other, first, every=2)
    with pytest.raises(polyak.StateError, match=r"rank 0: .*another run"):
        other.update()
    again.close()
    assert other.n == 1
    recorder = polyak.posthoc.Recorder(averager, second, every=1)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(second)
        second.write_text("in the way")
    torch.distributed.barrier()
    for _ in range(2):
        n = averager.n
        with pytest.raises(polyak.SnapshotError, match="rank 0: "):
            averager.update()
        assert averager.n == n + 1
    torch.distributed.barrier()
    if rank == 0:
        second.unlink()
        second.mkdir()
    torch.distributed.barrier()
    averager.update()
    recorder.close()
    if rank == 0:
        assert [*second.glob("average-*.safetensors")]


def what_one_rank_synthesised_goes_into_a_sharded_model(rank, folder):
    model, other = fsdp(built()), fsdp(built(seed=5))
    averager = polyak.average(model, "swa")
    with polyak.posthoc.Recorder(averager, folder / "made", every=2):
        trained(model, 6, between=lambda step: averager.update())
    made = polyak.posthoc.synthesize(folder / "made", "swa").state_dict if rank == 0 else {}
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, made, options=whole)
    got, wanted = weights(other), averager.averaged_state_dict(full=True)
    if rank == 0:
        assert {*wanted} == {*got, "head.weight"}  # which is tied
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, wanted[name].double(), rtol=1e-6, atol=1e-7)
    # Or each rank reads the folder, and takes its own parts.
    torch.distributed.barrier()
    third = fsdp(built(seed=6))
    polyak.posthoc.synthesize(folder / "made", "swa").copy_to(third)
    got = weights(third)
    if rank == 0:
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, wanted[name].double(), rtol=1e-6, atol=1e-7)


def under_ddp_only_rank_0_writes(rank, folder):
    averager = polyak.average(ddp(built()), "ema", decay=0.5, buffers="skip")
    shared, own = folder / "ddp", folder / f"seen by {rank}"
    with polyak.posthoc.Recorder(averager, shared, every=2), polyak.posthoc.Recorder(averager, own, every=2):
        for _ in range(4):
            averager.update()
    torch.distributed.barrier()
    assert len([*shared.glob("*.safetensors")]) == 1 + 2 * 2
    assert own.exists() == (rank == 0)


def an_error_of_another_kind_on_rank_0_is_told_by_every_rank(rank, folder):
    averager = polyak.average(fsdp(built()), "ema", decay=0.5)
    recorder = polyak.posthoc.Recorder(averager, folder / "kinds", every=1, keep=1, blocks=False)
    averager.update()
    if rank == 0:  # which cannot be removed as the oldest snapshot
        (folder / "kinds" / "average-000000000000.safetensors").mkdir()
    with pytest.raises(polyak.SnapshotError, match=r"rank 0: (IsADirectory|Permission)Error"):
        averager.update()
    if rank == 0:
        (folder / "kinds" / "average-000000000000.safetensors").rmdir()
    recorder.close()
    assert averager.n == 2


def ranks_agree_on_starts_and_histories(rank, folder):
    for name, shard in {"ddp": ddp, "fsdp": fsdp}.items():
        model, here = shard(built()), folder / f"identities {name}"
        averager, other = (polyak.average(model, "ema", decay=0.5, buffers="skip") for _ in range(2))
        with polyak.posthoc.Recorder(averager, here, every=2):
            trained(model, 5, between=lambda step, averager=averager: averager.update())
            saved = averager.state_dict()
            told = [None, None]
            torch.distributed.all_gather_object(told, averager.identity)
            assert told[0] == told[1], name
            assert told[0].start, name
            assert [step for step, _ in told[0].marks] == [2, 4], name
            trained(model, 5, between=lambda step, other=other: other.update())
            averager.load_state_dict(other.state_dict())
            if rank == 0 or name == "fsdp":  # under DDP the other rank neither writes nor looks
                with pytest.raises(polyak.StateError, match="is of another run"):
                    averager.update()
        averager.load_state_dict(saved)
        with polyak.posthoc.Recorder(averager, here, every=2):
            averager.update(step=6)
        torch.distributed.barrier()
        assert max(path.name for path in here.glob("average-*")) == "average-000000000006.safetensors"


def a_stage_of_a_pipeline_is_recorded_saved_and_loaded_by_its_own_ranks(rank, folder):
    """Rank 0 has no part of it, and is not asked."""
    stage = DeviceMesh("cpu", [1, 2])
    if not rank:
        return
    model, group = fsdp(built(), mesh=stage), stage.get_group()
    averager, other = (polyak.average(model, "ema", decay=0.5, buffers="skip") for _ in range(2))
    with polyak.posthoc.Recorder(averager, folder / "stage", every=2):
        trained(model, 4, between=lambda step: averager.update())
    wanted = averager.averaged_state_dict(full=True)
    assert bool(wanted) == (rank == 1)
    assert len([*(folder / "stage").glob("*.safetensors")]) == 1 + 2 * 2
    if wanted:
        made = polyak.posthoc.synthesize(folder / "stage", "ema", decay=0.5)
        torch.testing.assert_close(made.state_dict["up.weight"], wanted["up.weight"])
    taken = polyak.posthoc.Recorder(other, folder / "stage", every=2)
    with pytest.raises(polyak.StateError, match=r"rank 1: .*another run"):
        other.update()
    taken.close()
    polyak.distributed.verify_in_sync(averager, group=group)
    plain = polyak.average(built(), "ema")
    plain.update(step=rank)
    with pytest.raises(polyak.DistributedError, match=r"last step: 1 on rank 1; 2 on rank 2"):
        polyak.distributed.verify_in_sync(plain, group=group)
    polyak.distributed.save(averager, folder / "saved", group=group)
    polyak.distributed.load(other, folder / "saved", group=group)
    assert other.n == 4
    same(bits(other), bits(averager))
    with pytest.raises(polyak.StateError, match=r"cannot be loaded \(rank 2\): there is no such folder"):
        polyak.distributed.load(other, folder / ("saved" if rank == 1 else "unseen"), group=group)


ALL = [
    a_recorder_writes_whole_tensors_once_and_any_average_can_be_made_of_them,
    what_rank_0_cannot_do_is_told_by_every_rank_and_training_goes_on,
    what_one_rank_synthesised_goes_into_a_sharded_model,
    under_ddp_only_rank_0_writes,
    ranks_agree_on_starts_and_histories,
    an_error_of_another_kind_on_rank_0_is_told_by_every_rank,
]
