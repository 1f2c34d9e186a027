"""Whether all ranks have the same average, bit for bit; and one rank's average for the others."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from polyak.errors import DistributedError, ModelError
from polyak.errors.formatting import shortened
from polyak.ranks.unresponsive import answered, words
from polyak.tensors.sharding.placement import Spread
from polyak.tensors.wrappers import dtensor

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from polyak.engine import Engine
    from polyak.engine.averager import Averager
    from polyak.engine.bank import Bank

__all__ = ["alone", "asked", "broadcast", "check_counters", "check_one_average", "members", "rank", "verify_in_sync"]

_SHOWN = 6
_STAGES = (
    " Ranks that hold different parts of a model (pipeline stages, experts) each need a folder and group= of their own."
)
_REST = "All ranks call this. Nothing was changed here; start all ranks again from the last checkpoint."


def verify_in_sync(averager: Averager | Bank, *, group: ProcessGroup | None = None) -> None:
    """Check that all ranks have the same average, bit for bit, and that they made it by the same strategy and steps.

    All ranks call it. Under DDP every tensor is compared on all ranks; of sharded tensors each part is compared on the
    ranks that hold it. Each rank reads its average once and sends a digest of each tensor.

    Args:
        averager: This rank's averager or bank.
        group: The ranks that are compared. Defaults to all.

    Raises:
        DistributedError: If ranks disagree, or one does not answer. Every rank raises it and names the ranks and the
            tensors or settings that differ.

    Often confused with: equal *models*. DDP keeps parameters alike, but not the statistics of batch norm, which each
    rank has from its own batches, before and after averaging.
    """
    if isinstance(averager, Mapping):
        for one in averager.values():
            verify_in_sync(one, group=group)
        return
    _refuse(_disagreements({**_about(averager), "tensors": tuple(averager.averages)}, group, "compare averages"))
    # Only now all ranks have the same tensors to compare.
    digests = asked(_digests(averager.averages), group, "compare averages")
    _refuse(_differences(members(group) or range(len(digests)), digests))


def check_counters(averager: Averager | Bank, purpose: str, group: ProcessGroup | None) -> None:
    """Refuse averages that ranks made by other strategies, steps or numbers of updates; all ranks call it.

    Raises:
        DistributedError: If ranks disagree, or one does not answer. Every rank raises it.
    """
    banked = averager.items() if isinstance(averager, Mapping) else [("", averager)]
    about = {f"{name} {key}".strip(): value for name, one in banked for key, value in _about(one).items()}
    _refuse(_disagreements(about, group, purpose))


def check_one_average(averager: Averager | Bank, purpose: str, group: ProcessGroup | None) -> None:
    """Refuse ranks that average different parameters, by digests; all ranks call it.

    Buffers may differ: DDP leaves each rank the statistics of its own batches.

    Raises:
        DistributedError: If ranks have other tensors or other values, or one does not answer. Every rank raises it.
    """
    banked = averager.items() if isinstance(averager, Mapping) else [("", averager)]
    names = {f"{name} tensors".strip(): tuple(one.averages) for name, one in banked}
    _refuse(_disagreements(names, group, purpose), _STAGES)
    digests: dict[Hashable, str] = {}
    for name, one in banked:
        parameters = {s.name for s in cast("Engine", one).stored if s.kind == "parameter"}
        own = _digests({key: tensor for key, tensor in one.averages.items() if key in parameters})
        digests |= {(f"{name}.{key[0]}" if name else key[0], *key[1:]): digest for key, digest in own.items()}
    answers = asked(digests, group, purpose)
    _refuse(_differences(members(group) or range(len(answers)), answers), _STAGES)


def _refuse(problems: Sequence[str], more: str = "") -> None:
    if not problems:
        return
    message = (
        f"the ranks disagree about the average:\n  {shortened(problems, _SHOWN)}\n"
        "Build averagers after wrapping, from equal weights, and call update() on all ranks at the same "
        f"steps; polyak.distributed.broadcast() gives all the average of one.{more}"
    )
    raise DistributedError(message)


def broadcast(averager: Averager | Bank, *, source: int = 0, group: ProcessGroup | None = None) -> None:
    """Give all ranks the average or the bank of one: its tensors, counters and history. All ranks call it.

    For ranks that have diverged, and for an average that only one rank updates to save the others' time: they receive
    it before an evaluation.

    Args:
        averager: This rank's averager or bank; the same model and strategies everywhere, and not sharded.
        source: The rank that has the average.
        group: The ranks. Defaults to all.

    Raises:
        ModelError: If ``model`` is sharded: each rank has another part of it.
        DistributedError: If a rank is gone.
    """
    kind = dtensor()
    every = averager.values() if isinstance(averager, Mapping) else [averager]
    if kind is not None and any(isinstance(tensor, kind) for one in every for tensor in one.averages.values()):
        message = "the averager is sharded: each rank has its own parts, and there is nothing to broadcast"
        raise ModelError(message)
    if alone():
        return
    state = averager.state_dict() if rank() == source else None
    received = [state]
    with answered(f"broadcast rank {source}'s average", _REST, ranks=members(group)):
        dist.broadcast_object_list(received, src=source, group=group)
    if received[0] is not None and rank() != source:
        averager.load_state_dict(received[0])


def asked(answer: Any, group: ProcessGroup | None, purpose: str) -> list[Any]:  # noqa: ANN401 - whatever ranks send each other
    """Return every rank's answer, by its number in the group.

    Raises:
        DistributedError: If a rank did not answer.
    """
    if alone():
        return [answer]
    answers: list[Any] = [None] * dist.get_world_size(group)
    with answered(purpose, _REST, ranks=members(group)):
        dist.all_gather_object(answers, answer, group=group)
    return answers


def alone() -> bool:
    """Return whether there is no other rank.

    Raises:
        DistributedError: If other processes were started, and there is no process group.
    """
    if dist.is_available() and dist.is_initialized():
        return False
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":  # torchrun's
        message = (
            f"{count} processes were started (WORLD_SIZE) and there is no process group: each would work by itself; "
            "call torch.distributed.init_process_group() first"
        )
        raise DistributedError(message)
    return True


def rank() -> int:
    """Return this process's number; 0 where it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def members(group: ProcessGroup | None) -> list[int] | None:
    """Return the ranks of a group, or None for all."""
    return None if group is None else dist.get_process_group_ranks(group)


def _about(averager: Averager) -> dict[str, object]:
    engine = cast("Engine", averager)
    return {
        "strategy": repr(averager.strategy),
        "updates": averager.n,
        "last step": engine.progress.averaged,
        "rate": averager.rate,
        # What a rank held of its own part is no other rank's.
        **({} if engine.options.nonfinite == "hold" else {"skipped": averager.skipped}),
    }


def _digests(averages: Mapping[str, Tensor]) -> dict[tuple[Hashable, ...], str]:
    kind = dtensor()
    digests: dict[tuple[Hashable, ...], str] = {}
    for name, tensor in averages.items():
        whole: Any = tensor
        if kind is not None and isinstance(whole, kind):
            spread = Spread.of(whole)
            # Ranks that hold one part are compared, on whichever row of a mesh they are.
            digests[name, str(spread), spread.replicas] = _digest(whole._local_tensor)  # noqa: SLF001 - to_local() may wait for others
        else:
            digests[name,] = _digest(tensor)
    return digests


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().resolve_conj()
    bits = data.reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(bits.tobytes(), digest_size=16).hexdigest()


def _disagreements(about: Mapping[str, object], group: ProcessGroup | None, purpose: str) -> list[str]:
    received = asked(about, group, purpose)
    ranks = members(group) or range(len(received))
    answers = {key: [one.get(key) for one in received] for key in dict.fromkeys(key for one in received for key in one)}
    return [f"{key}: {_by_answer(ranks, own)}" for key, own in answers.items() if len({*map(repr, own)}) > 1]


def _differences(ranks: Sequence[int], digests: Sequence[Mapping[Hashable, str]]) -> list[str]:
    problems = []
    for key in dict.fromkeys(key for own in digests for key in own):
        answers = {rank: own[key] for rank, own in zip(ranks, digests, strict=True) if key in own}
        if len({*answers.values()}) > 1:
            usual = Counter(answers.values()).most_common(1)[0][0]
            others = [rank for rank, answer in answers.items() if answer != usual]
            alike = [rank for rank, answer in answers.items() if answer == usual]
            name = key[0] if isinstance(key, tuple) else key
            problems.append(f"{name}: {words(others)} not as {words(alike)}")
    return problems


def _by_answer(ranks: Sequence[int], answers: Sequence[object]) -> str:
    by_answer: dict[str, list[int]] = {}
    for rank, answer in zip(ranks, answers, strict=True):
        by_answer.setdefault(repr(answer)[:200], []).append(rank)
    return "; ".join(f"{answer} on {words(alike)}" for answer, alike in by_answer.items())
