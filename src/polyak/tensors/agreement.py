"""One answer of all ranks that share a model: the only thing that ranks tell each other in an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyak.errors import DistributedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["agreement", "first_rank"]


def agreement(meshes: Sequence[DeviceMesh]) -> Callable[[bool], bool] | None:
    """Return what tells whether every rank of these meshes said yes: one reduction of a byte per dimension.

    Every rank must ask, the same number of times.
    """
    if not meshes:
        return None
    mesh = _widest(meshes)
    # Where no mesh has all the ranks, all the ranks there are are asked.
    groups: list[Any] = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
    device = torch.device(meshes[0].device_type)

    def all_said_yes(answer: bool) -> bool:  # noqa: FBT001 - it is the answer
        said = torch.tensor([answer], dtype=torch.uint8, device=device)
        try:
            for group in groups:
                torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=group)
            return bool(said.item())
        except RuntimeError as error:
            message = (
                f"rank {torch.distributed.get_rank()} waited for the others to tell whether their weights are finite, "
                f"and one is gone or did not call update(): {error}\nNothing was averaged here. Start all ranks again "
                "from the last checkpoint. nonfinite='propagate' asks nobody."
            )
            raise DistributedError(message) from error

    return all_said_yes


def first_rank(meshes: Sequence[DeviceMesh]) -> int:
    """Return the first of the ranks that share a model."""
    mesh = _widest(meshes)
    return 0 if mesh is None else int(mesh.mesh.min())


def _widest(meshes: Sequence[DeviceMesh]) -> DeviceMesh | None:
    """Return the mesh that has the ranks of all the others, if there is one."""
    ranks = {mesh: {*mesh.mesh.flatten().tolist()} for mesh in meshes}
    widest = max(ranks, key=lambda mesh: len(ranks[mesh]))
    return widest if all(own <= ranks[widest] for own in ranks.values()) else None
