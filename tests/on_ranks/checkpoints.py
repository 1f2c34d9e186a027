"""What ranks write and read with torch.distributed.checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import polyak
from on_ranks import models
from on_ranks.averaging import Delayed
from on_ranks.models import bits, built, ddp, fsdp, same, trained

LAYOUTS = {"fsdp": fsdp, "ddp": ddp, "tp_fsdp": models.tp_fsdp, "hsdp": models.hsdp, "plain": lambda model: model}


def averagers(layout):
    """Return a model in a layout, and the averagers that are saved and loaded: one of each kind of state."""
    model = LAYOUTS[layout](built())
    many = {
        "ema": polyak.average(model, "ema", decay=0.75),
        "swa": polyak.average(model, "swa"),
        "short": polyak.average(model, "ema", decay=0.75, dtype="bfloat16", buffers="skip"),
        "slots": polyak.average(model, Delayed(), dtype="float64"),
        "bank": polyak.bank(model, {"a": "ema", "b": "swa"}),
    }
    return model, many


def used(layout, steps=3):
    model, many = averagers(layout)

    def update(step):
        for averager in many.values():
            averager.update(step=step)

    trained(model, steps, between=update)
    return model, many


def everything(averager):
    if isinstance(averager, polyak.Bank):
        return {f"{name}/{key}": value for name, one in averager.items() for key, value in everything(one).items()}
    found = dict(bits(averager))
    for slot, tensors in averager.state_dict()["slots"].items():
        found |= {f"{slot}/{name}": models.whole(tensor) for name, tensor in tensors.items()}
    (history,) = averager.state_dict()["history"]
    counts = torch.tensor([averager.n, averager.skipped, averager.rate or 0.0], dtype=torch.float64)
    return {**found, "counts": counts, **{f"history {key}": column for key, column in history.items()}}


def writes(rank, folder, layout):
    """Save by our own function and by DCP's, and what is in it for comparison."""
    _, many = used(layout)
    for name, averager in many.items():
        polyak.distributed.save(averager, Path(folder) / layout / name)
        dcp.save(
            {"averager": averager, "other": {"x": torch.ones(3)}},
            checkpoint_id=Path(folder) / layout / f"{name} by dcp",
        )
    wanted = {name: everything(averager) for name, averager in many.items()}
    if rank == 0:
        torch.save(wanted, Path(folder) / layout / "wanted.pt")


def reads(rank, folder, written_by, layout):
    """Load what ranks of any number and layout wrote, exactly."""
    wanted = torch.load(Path(folder) / written_by / "wanted.pt")
    for loading in ("own", "dcp"):
        _, many = averagers(layout)
        for name, averager in many.items():
            averager.update()  # a history of another length than what is loaded
            if loading == "own":
                polyak.distributed.load(averager, Path(folder) / written_by / name)
            else:
                dcp.load({"averager": averager}, checkpoint_id=Path(folder) / written_by / f"{name} by dcp")
            same(everything(averager), wanted[name])
            averager.update(step=10)


def an_asynchronous_save_keeps_the_moment_of_its_call(rank, folder, *_):
    model, many = used("fsdp")
    averager = many["ema"]
    wanted = everything(averager)
    # A group of its own: on CPUs the training's ranks talk by the same one, and messages of two threads would mix.
    alone = dist.new_group(backend="gloo")
    saving = dcp.async_save({"averager": averager}, checkpoint_id=Path(folder) / "async", process_group=alone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for _ in range(30):
        averager.update()
    saving.result()
    polyak.distributed.load(averager, Path(folder) / "async")
    same(everything(averager), wanted)


def a_folder_that_does_not_fit_is_refused_whole(rank, folder, *_):
    _, many = used("fsdp")
    averager, swa = many["ema"], many["swa"]
    place = Path(folder) / "refusals"
    polyak.distributed.save(swa, place / "swa")
    polyak.distributed.save(averager, place / "right")
    small = models.fully_shard(torch.nn.Linear(5, 9), mesh=models.world())
    polyak.distributed.save(polyak.average(small, "ema"), place / "small")
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=place / "model only")
    if rank == 0:
        (place / "empty").mkdir()
        for damage in ("truncated", "without metadata", "without a file"):
            _copy(place / "right", place / damage)
        for file in (place / "truncated").glob("*.distcp"):
            os.truncate(file, file.stat().st_size // 2)
        (place / "without metadata" / ".metadata").unlink()
        next((place / "without a file").glob("__1_*.distcp")).unlink()
        _copy(place / "right", place / "broken metadata")
        (place / "broken metadata" / ".metadata").write_bytes(b"\x80nothing")
    dist.barrier()
    before = everything(averager)
    expected = {
        "swa": "made by the strategy 'swa'",
        "small": "emb.weight is missing",
        "model only": "holds no 'averager'",
        "empty": "not a finished checkpoint",
        "absent": "no such folder",
        "truncated": "could not read",
        "without metadata": "not a finished checkpoint",
        "without a file": "could not read",
        "broken metadata": "incomplete or damaged",
    }
    for name, words in expected.items():
        with pytest.raises(polyak.StateError, match=words):
            polyak.distributed.load(averager, place / name)
        same(everything(averager), before)
    with pytest.raises(polyak.StateError, match=r"bank\.a\.slots\.average\.emb\.weight is missing"):
        polyak.distributed.load(many["bank"], place / "right")
    # DCP's own refusal is no Exception; nothing is changed either.
    for name in ("small", "swa", "truncated", "without a file", "model only"):
        with pytest.raises(dcp.CheckpointException):
            dcp.load({"averager": averager}, checkpoint_id=place / name)
        same(everything(averager), before)
    before = everything(swa)
    with pytest.raises(polyak.StateError, match="made by the strategy 'ema'"):
        dcp.load({"averager": swa}, checkpoint_id=place / "right")
    same(everything(swa), before)


def _copy(source, target):
    import shutil

    shutil.copytree(source, target)


def a_float32_average_is_not_cut_down(rank, folder, *_):
    model = fsdp(built())
    wide, short = polyak.average(model, "ema", dtype="float32"), polyak.average(model, "ema", dtype="bfloat16")
    trained(model, 2, between=lambda step: wide.update())
    polyak.distributed.save(wide, Path(folder) / "wide")
    polyak.distributed.load(short, Path(folder) / "wide")
    same(bits(short), bits(wide))


def a_folder_is_replaced_whole(rank, folder, *_):
    model, many = used("fsdp", steps=1)
    place = Path(folder) / "again"
    for _ in range(3):
        many["ema"].update()
        polyak.distributed.save(many["ema"], place)
    wanted = everything(many["ema"])
    assert [path.name for path in place.parent.glob(".again*")] == []
    dist.barrier()
    if rank == 0:  # cut off between the two steps in which a folder takes another's place
        place.rename(place.parent / ".again.old")
    dist.barrier()
    other = polyak.average(model, "ema", decay=0.75)
    polyak.distributed.load(other, place)
    same(everything(other), wanted)


def _statistics(seed=0):
    """Return a model whose ranks have statistics of their own, and what averages it."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    return model, polyak.bank(model, {"ema": {"name": "ema", "decay": 0.5}, "lawa": {"name": "lawa", "window": 2}})


def what_every_rank_holds_is_one_ranks(rank, folder, *_):
    model, bank = _statistics()
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for step in range(3):
            model(torch.randn(16, 4, generator=generator))
            model[0].weight.add_(step)
            bank.update()
    for name, saved in {"bank": bank, "ema": bank["ema"]}.items():
        own = everything(saved)
        wanted = [own]
        dist.broadcast_object_list(wanted)
        differing = {key.rpartition("/")[2] for key in own if not torch.equal(own[key], wanted[0][key])}
        assert {"1.running_mean", "1.running_var"} <= differing or rank == 0
        polyak.distributed.save(saved, Path(folder) / f"statistics {name}")
        other = _statistics()[1]
        loaded = other if name == "bank" else other["ema"]
        polyak.distributed.load(loaded, Path(folder) / f"statistics {name}")
        same(everything(loaded), wanted[0])
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # as the docs advise
    dcp.save({"averager": bank["ema"]}, checkpoint_id=Path(folder) / "statistics dcp", planner=planner)
    other = _statistics()[1]["ema"]
    dcp.load({"averager": other}, checkpoint_id=Path(folder) / "statistics dcp")
    same(everything(other), wanted[0])


def ranks_that_average_other_weights_write_nothing(rank, folder, *_):
    stages = torch.nn.Linear(4, 4 + rank), torch.nn.Sequential(torch.nn.Linear(4, 4 + rank))
    _, alike = _statistics()
    _, apart = _statistics(seed=rank)
    for bank in (alike, apart):
        bank.update()
    place = Path(folder) / "apart"
    polyak.distributed.save(alike, place)
    refused = {
        "0.weight: rank 1 not as rank 0": apart["ema"],
        "lawa.0.bias: rank 1 not as rank 0": apart,
        "weight: rank 1 not as rank 0": polyak.average(stages[0], "swa"),
        "tensors: .*'0.weight'": polyak.average(stages[1 if rank else 0], "swa"),
    }
    for words, averager in refused.items():
        with pytest.raises(polyak.DistributedError, match=words) as raised:
            polyak.distributed.save(averager, place)
        assert "group=" in str(raised.value)
    own = [dist.new_group([one]) for one in range(dist.get_world_size())][rank]
    polyak.distributed.save(apart, Path(folder) / f"stage {rank}", group=own)
    other = _statistics(seed=5)[1]
    polyak.distributed.load(other, Path(folder) / f"stage {rank}", group=own)
    same(everything(other), everything(apart))
    dist.barrier()
    polyak.distributed.load(other, place)
    same(everything(other), everything(alike))


def a_bank_is_broadcast(rank, *_):
    _model, bank = _statistics(seed=rank)
    for _ in range(rank + 1):
        bank.update()
    polyak.distributed.broadcast(bank, source=1)
    polyak.distributed.verify_in_sync(bank)
    assert {name: averager.n for name, averager in bank.items()} == {"ema": 2, "lawa": 2}
    torch.manual_seed(1)
    assert torch.equal(bank["lawa"].averages["0.weight"], torch.nn.Linear(4, 8).weight.detach())


def read_and_written(rank, folder, read, written):
    """Read pairs of a layout written and a layout read into; then write layouts."""
    for written_by, layout in read:
        reads(rank, folder, written_by, layout)
    for layout in written:
        writes(rank, folder, layout)


TWO = [
    read_and_written,
    an_asynchronous_save_keeps_the_moment_of_its_call,
    a_folder_that_does_not_fit_is_refused_whole,
    a_float32_average_is_not_cut_down,
    a_folder_is_replaced_whole,
    what_every_rank_holds_is_one_ranks,
    ranks_that_average_other_weights_write_nothing,
    a_bank_is_broadcast,
]
