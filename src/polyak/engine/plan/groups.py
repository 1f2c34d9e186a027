"""The tensors of one update as few calls as there are kinds of them: by device, dtype, policy and kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from polyak.kernels.base import SHORT
from polyak.kernels.layout import dense
from polyak.kernels.select import CHUNKED, CompilerError, Kernel, KernelName, bind, kernel_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import Tensor

    from polyak.tensors.storage import Stored

__all__ = ["Group", "Lane", "grouped"]


class Located(Protocol):
    """Knows whether tensors were given other memory."""

    @property
    def epoch(self) -> int:
        """How often they were."""


class Lane(NamedTuple):
    """One averager's share in an update.

    Attributes:
        stored: Its stored tensors.
        live: The live tensor of each.
        kernel: The kernel it asks for.
        nearest: Whether short averages are rounded to the nearest value, and not at random.
        watch: Knows whether the tensors were given other memory; it looks at the beginning of each call.
        agree: Makes one answer of all ranks' to whether the weights are finite; None where each decides alone.
    """

    stored: Sequence[Stored]
    live: Sequence[Tensor]
    kernel: KernelName
    nearest: bool
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
    while True:
        try:
            return sorted(_bound(lanes), key=_scratch, reverse=True)
        except CompilerError:  # it is not asked again: at most once for each compiler
            continue


def _bound(lanes: Sequence[Lane]) -> list[Group]:
    kinds = _Kinds(lanes)
    rows: dict[tuple[_Kind, tuple[int, ...]], tuple[list[Tensor], list[list[Stored]]]] = {}
    for moves, (weights, columns) in kinds.moves().items():
        alike: dict[_Kind, list[int]] = {}
        for place, number in enumerate(moves):
            alike.setdefault(kinds.known[number][1], []).append(place)
        for kind, places in alike.items():
            numbers = tuple([kinds.known[moves[place]][0] for place in places])
            tensors, own = rows.setdefault((kind, numbers), ([], [[] for _ in places]))
            tensors += weights
            for place, column in zip(places, own, strict=True):
                column.extend(columns[place])
    groups = []
    for (kind, moved), (weights, own) in rows.items():
        averages = [[stored.average for stored in column] for column in own]
        one = own[0][0]
        draws = f"{one.name} {one.spread.replicas}" if kind.alone == id(one) and one.spread else ""
        groups.append(Group(bind(kind.kernel, averages, weights), moved, averages, weights, kind.policy, draws))
    return groups


class _Kinds:
    """How lanes move their tensors, known by its number: to choose a kernel takes longer than to tell tensors apart.

    Attributes:
        known: For each number the lane and the kind.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._numbers: dict[object, int] = {}
        self.known: list[tuple[int, _Kind]] = []

    def moves(self) -> dict[tuple[int, ...], tuple[list[Tensor], list[list[Stored]]]]:
        """Return the live tensors, and what is stored of them, by how they are moved in each lane that has them."""
        found: dict[tuple[int, ...], tuple[list[Tensor], list[list[Stored]]]] = {}
        for live, stored in _by_weight(self._lanes):
            numbers = tuple([self._number(one, live, lane) for lane, one in stored.items()])
            if numbers not in found:
                found[numbers] = [], [[] for _ in numbers]
            weights, columns = found[numbers]
            weights.append(live)
            for column, one in zip(columns, stored.values(), strict=True):
                column.append(one)
        return found

    def _number(self, stored: Stored, live: Tensor, lane: int) -> int:
        average, policy = stored.average, stored.policy
        # Parts of spread tensors draw random numbers of their own: ranks hold others beside them.
        alone = id(stored) if stored.spread is not None and average.dtype in SHORT else 0
        # All that a kernel is chosen by.
        layout = average.stride() == live.stride(), dense(live), live.is_neg(), live.is_conj()
        key = lane, policy, average.device, average.dtype, live.device, live.dtype, type(live), layout, alone
        if key not in self._numbers:
            own = self._lanes[lane]
            name = kernel_for(average, live, own.kernel, copied=policy == "copy", nearest=own.nearest)
            if name in CHUNKED or policy == "copy":  # which have a group for each lane
                alone = alone or lane
            self._numbers[key] = len(self.known)
            kind = _Kind(name, policy, (average.device, average.dtype), (live.device, live.dtype), alone)
            self.known.append((lane, kind))
        return self._numbers[key]


def _by_weight(lanes: Sequence[Lane]) -> Iterable[tuple[Tensor, dict[int, Stored]]]:
    if len(lanes) == 1:
        return [(live, {0: stored}) for stored, live in zip(lanes[0].stored, lanes[0].live, strict=True)]
    found: dict[int, tuple[Tensor, dict[int, Stored]]] = {}
    for number, lane in enumerate(lanes):
        for stored, live in zip(lane.stored, lane.live, strict=True):
            found.setdefault(id(live), (live, {}))[1][number] = stored
    return found.values()


def _scratch(group: Group) -> int:
    return max(weight.numel() for weight in group.weights) if group.kernel.name in CHUNKED else 0
