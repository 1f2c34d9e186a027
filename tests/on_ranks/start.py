"""Real processes for tests: several ranks over gloo, in one start that runs many checks."""

from __future__ import annotations

import datetime as dt
import os
import socket
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The FSDP2 of torch 2.6 does not train on CPUs: its own forward and backward raise.
FSDP2_TRAINS = hasattr(torch.cpu.Stream, "record_event")
SECONDS = 30  # how long a rank waits for another one
PRELOADED = [
    "polyak",
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "torch._dynamo",
]


_RESET = "Connection reset by peer"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(ranks, checks, *args, dying=()):
    """Run ``check(rank, *args)`` for each check on so many ranks; return the failures, in words, by check and rank.

    The checks are functions of an importable module. A rank in ``dying`` may end as it likes.
    Where gloo lost a connection although no rank died by a signal, as on a busy machine, all is run again.
    """
    failures, codes = _attempt(ranks, checks, args, dying)
    if not dying and any(_RESET in text for text in failures.values()) and min(codes) >= 0:
        failures, codes = _attempt(ranks, checks, args, dying)
    words = "\n".join(f"{name} on rank {rank}:\n{text}" for (name, rank), text in failures.items())
    assert not failures, f"{words}\nThe ranks ended with {codes}."


def _attempt(ranks, checks, args, dying):
    # The server imports what every process needs once; its children are copies of it.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, checks, args, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    told, hung = {}, [rank for rank, process in enumerate(processes) if process.is_alive()]
    codes = [process.exitcode or 0 for process in processes]
    for process in processes:
        process.kill()
    while not results.empty():
        rank, name, failure = results.get()
        told[name, rank] = failure
    assert not hung, f"ranks {hung} hung; so far: {[*told]}, {[f for f in told.values() if f]}"
    alive = [rank for rank in range(ranks) if rank not in dying]
    missing = [(c.__name__, rank) for c in checks for rank in alive if (c.__name__, rank) not in told]
    failures = {key: failure for key, failure in told.items() if failure}
    assert failures or not missing, f"these never ended: {missing}; the ranks ended with {codes}"
    return failures, codes


def _rank(rank, ranks, port, checks, args, results):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    warnings.simplefilter("error")
    # torch's own, about itself
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="torch")
    if ranks > 1 or os.environ.get("POLYAK_TEST_GROUP"):
        dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=dt.timedelta(seconds=SECONDS))
    for check in checks:
        try:
            torch.manual_seed(0)
            check(rank, *args)
            failure = ""
        except BaseException:  # noqa: BLE001 - whatever it was, told and read in the test
            failure = traceback.format_exc()
        results.put((rank, check.__name__, failure))
        if failure:
            break  # the other ranks may be elsewhere now
    if dist.is_initialized() and not failure:
        dist.destroy_process_group()
