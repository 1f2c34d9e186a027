"""What the ranks that share a model send each other: in an update no more than one yes or no."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from polyak.ranks.unresponsive import answered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["agreement", "first_rank", "from_first", "ranks_of"]

_REST = (
    "All ranks call update() at the same steps. Nothing was averaged here; start all ranks again from the last "
    "checkpoint. With nonfinite='propagate' no rank asks another."
)


def agreement(meshes: Sequence[DeviceMesh]) -> Callable[[bool], bool] | None:
    """Return a function that checks whether all ranks of these meshes agree: one reduction of a byte per dimension.

    Every rank must ask, the same number of times.
    """
    if not meshes:
        return None
    groups = [group for group, _ in _groups(meshes)]
    device, ranks = torch.device(meshes[0].device_type), ranks_of(meshes)

    def all_said_yes(answer: bool) -> bool:  # noqa: FBT001 - it is the answer
        said = torch.tensor([answer], dtype=torch.uint8, device=device)
        with answered("ask whether all weights are finite", _REST, ranks=ranks):
            for group in groups:
                dist.all_reduce(said, dist.ReduceOp.MIN, group=group)
            return bool(said.item())

    return all_said_yes


def from_first(meshes: Sequence[DeviceMesh], message: Any, purpose: str, rest: str) -> Any:  # noqa: ANN401 - whatever the first one says
    """Return the answer of the first of the ranks that share a model.

    Args:
        meshes: The ranks.
        message: This rank's answer, if it is the first.
        purpose: What fails where a rank does not answer, as a verb.
        rest: What that means, and what to do.

    Raises:
        DistributedError: If a rank does not answer.
    """
    box = [message]
    with answered(purpose, rest, ranks=ranks_of(meshes)):
        # Along one dimension after the other, as from a corner.
        for group, source in _groups(meshes):
            dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def first_rank(meshes: Sequence[DeviceMesh]) -> int:
    """Return the first of the ranks that share a model."""
    return (ranks_of(meshes) or [0])[0]


def ranks_of(meshes: Sequence[DeviceMesh]) -> list[int] | None:
    """Return the ranks that share a model, or None for all."""
    mesh = _widest(meshes)
    return None if mesh is None else [int(rank) for rank in mesh.mesh.flatten()]


def _groups(meshes: Sequence[DeviceMesh]) -> list[tuple[Any, int]]:
    """Return this rank's group for each dimension, and the first rank of each."""
    mesh = _widest(meshes)
    if mesh is None:  # where no mesh has all of these ranks, all ranks of the process are asked
        return [(None, 0)]
    here = mesh.get_coordinate() or [0] * mesh.ndim
    rows = [mesh.mesh[(*here[:dim], slice(None), *here[dim + 1 :])] for dim in range(mesh.ndim)]
    return [(mesh.get_group(dim), int(row[0])) for dim, row in enumerate(rows)]


def _widest(meshes: Sequence[DeviceMesh]) -> DeviceMesh | None:
    """Return the mesh that contains the ranks of all others, if there is one."""
    ranks = {mesh: {*mesh.mesh.flatten().tolist()} for mesh in meshes}
    widest = max(ranks, key=lambda mesh: len(ranks[mesh]))
    return widest if all(own <= ranks[widest] for own in ranks.values()) else None
