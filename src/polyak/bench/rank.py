"""``python -m polyak.bench.rank FOLDER RANK``: what one of several ranks does, started by ``polyak.bench.launch``."""

from __future__ import annotations

import datetime as dt
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from polyak.bench.entrants import polyaks
from polyak.bench.launch import Average, Found, Paths, Task
from polyak.bench.models import build
from polyak.bench.race import race
from polyak.bench.report import Quantiles
from polyak.io.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    import polyak
    from polyak.bench.entrants import Entrant

__all__: list[str] = []

_PATIENCE = dt.timedelta(minutes=2)
_WARM = 3


def _main(paths: Paths, rank: int) -> int:
    task = Task.model_validate_json(paths.task.read_bytes())
    try:
        found = _measured(task, rank, paths.meeting)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent process reports it
        found = Found(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    write_whole(paths.found(rank), lambda scratch: scratch.write_text(found.model_dump_json(), encoding="utf-8"))
    return bool(found.error)


def _measured(task: Task, rank: int, meeting: Path) -> Found:
    kind = task.settings.place.type
    here = replace(
        task.settings, device=kind if kind == "cpu" else f"{kind}:{rank}", kernels=task.settings.kernels or ("auto",)
    )
    device = here.place
    torch.set_num_threads(task.threads)
    if kind != "cpu":
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(
        dist.Backend.default_device_backend_map.get(kind, "gloo"),
        init_method=meeting.as_uri(), rank=rank, world_size=task.ranks, timeout=_PATIENCE,
    )  # fmt: skip
    model = build(task.model, device).model
    fully_shard(model, mesh=init_device_mesh(kind, (task.ranks,)))
    entrants = polyaks(here)
    seconds = here.seconds / len(entrants)
    averages = {entrant.name: _average(entrant, model, seconds, device) for entrant in entrants}
    dist.barrier()
    dist.destroy_process_group()
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return Found(weights=_held(weights.values()), averages=averages)


def _average(entrant: Entrant, model: nn.Module, seconds: float, device: torch.device) -> Average:
    averager: polyak.Averager = entrant.make(model, None)
    for _ in range(_WARM):
        entrant.update(averager, model)

    def agreed(rounds: int) -> int:
        agreed: list[Any] = [rounds]
        dist.broadcast_object_list(agreed, src=0, device=device)
        return int(agreed[0])

    # All ranks begin each update together, as after a training step, and share what the machine has.
    samples = race(
        {entrant.name: lambda: entrant.update(averager, model)}, seconds, device, "", dist.barrier, agreed=agreed
    )
    kept = [tensor for slot in averager.state_dict()["slots"].values() for tensor in slot.values()]
    return Average(
        milliseconds=Quantiles.of([1e3 * time for time in samples.of(entrant.name)]),
        disturbed=samples.disturbed(entrant.name),
        held=_held(kept),
        whole=sum(tensor.numel() * tensor.itemsize for tensor in kept),
    )


def _held(tensors: Iterable[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


if __name__ == "__main__":
    sys.exit(_main(Paths(Path(sys.argv[1])), int(sys.argv[2])))
