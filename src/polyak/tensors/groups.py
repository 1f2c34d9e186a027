"""The tensors of one update as few calls as there are kinds of them: by device, dtype, policy and kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from polyak.tensors.kernels import PIECEWISE, Kernel, KernelName, bind, kernel_for
from polyak.tensors.kernels.kernel import SHORT
from polyak.tensors.layout import dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import Tensor

    from polyak.tensors.storage import Stored

__all__ = ["Group", "Lane", "grouped"]


class Located(Protocol):
    """Knows whether live tensors were given other memory."""

    @property
    def epoch(self) -> int:
        """How often they were."""


class Lane(NamedTuple):
    """One averager's share in an update.

    Attributes:
        stored: Its stored tensors.
        live: The live tensor of each.
        kernel: The kernel it asks for.
        watch: Knows where the live tensors are.
        agree: Makes one answer of all ranks' to whether the weights are finite; None where each decides alone.
    """

    stored: Sequence[Stored]
    live: Sequence[Tensor]
    kernel: KernelName
    watch: Located
    agree: Callable[[bool], bool] | None = None


class Group(NamedTuple):
    """The tensors that one call of one kernel moves.

    Attributes:
        kernel: The kernel, bound to them.
        lanes: The numbers of the lanes it moves.
        averages: For each of these lanes its averages.
        weights: The live tensor of each.
        policy: Whether they are averaged or copied.
        draws: The name of the tensor and of the part of it, where its random numbers are those of every rank that holds
            this part; else empty.
    """

    kernel: Kernel
    lanes: tuple[int, ...]
    averages: list[list[Tensor]]
    weights: list[Tensor]
    policy: str
    draws: str = ""


class _Kind(NamedTuple):
    """What the tensors of a group have in common."""

    kernel: str
    policy: str
    stored: tuple[torch.device, torch.dtype]
    live: tuple[torch.device, torch.dtype]
    alone: int


def grouped(lanes: Sequence[Lane]) -> list[Group]:
    """Return the groups of an update, those first that need scratch memory, the largest first.

    Where there is too little of it, nothing has moved yet.
    """
    names: dict[object, str] = {}
    rows: dict[tuple[_Kind, tuple[int, ...]], tuple[list[Tensor], list[list[Stored]]]] = {}
    for live, stored in _by_weight(lanes):
        alike: dict[_Kind, list[int]] = {}
        for number in stored:
            alike.setdefault(_kind(stored[number], live, lanes[number].kernel, number, names), []).append(number)
        for kind, numbers in alike.items():
            weights, own = rows.setdefault((kind, tuple(numbers)), ([], [[] for _ in numbers]))
            weights.append(live)
            for number, column in zip(numbers, own, strict=True):
                column.append(stored[number])
    groups = []
    for (kind, moved), (weights, own) in rows.items():
        averages = [[stored.average for stored in column] for column in own]
        one = own[0][0]
        draws = f"{one.name} {one.spread.replicas}" if kind.alone == id(one) and one.spread else ""
        groups.append(Group(bind(kind.kernel, averages, weights), moved, averages, weights, kind.policy, draws))
    return sorted(groups, key=_scratch, reverse=True)


def _kind(stored: Stored, live: Tensor, wanted: KernelName, lane: int, names: dict[object, str]) -> _Kind:
    average = stored.average
    kind = (average.device, average.dtype), (live.device, live.dtype)
    # All that a kernel is chosen by: there are few such pairs, and to choose takes longer than to tell them apart.
    alike = kind, type(live), average.stride() == live.stride(), dense(live), live.is_neg(), live.is_conj()
    if (name := names.get(key := (stored.policy, wanted, *alike))) is None:
        name = names[key] = kernel_for(average, live, wanted, copied=stored.policy == "copy")
    # What is moved piece by piece, and what is copied, has a group for each lane.
    # Parts of spread tensors draw random numbers of their own: ranks hold others beside them.
    own_draws = stored.spread is not None and average.dtype in SHORT
    alone = id(stored) if own_draws else lane if name in PIECEWISE or stored.policy == "copy" else 0
    return _Kind(name, stored.policy, *kind, alone)


def _by_weight(lanes: Sequence[Lane]) -> Iterable[tuple[Tensor, dict[int, Stored]]]:
    if len(lanes) == 1:
        return [(live, {0: stored}) for stored, live in zip(lanes[0].stored, lanes[0].live, strict=True)]
    found: dict[int, tuple[Tensor, dict[int, Stored]]] = {}
    for number, lane in enumerate(lanes):
        for stored, live in zip(lane.stored, lane.live, strict=True):
            found.setdefault(id(live), (live, {}))[1][number] = stored
    return found.values()


def _scratch(group: Group) -> int:
    return max(weight.numel() for weight in group.weights) if group.kernel.name in PIECEWISE else 0
