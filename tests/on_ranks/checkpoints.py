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
    history = averager.state_dict()["history"]
    counts = torch.tensor([averager.n, averager.skipped, averager.rate or 0.0], dtype=torch.float64)
    return {**found, "counts": counts, **{f"history {i}": tensor for i, tensor in enumerate(history)}}


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
        "empty": "no finished checkpoint",
        "absent": "no such folder",
        "truncated": "could not read",
        "without metadata": "no finished checkpoint",
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
]
