"""How a tensor is sharded: how this rank's part becomes a DTensor, and whether two are sharded alike."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Spread", "described"]


class Spread(NamedTuple):
    """The layout of a DTensor.

    Attributes:
        mesh: The ranks.
        placements: What each dimension of the mesh does with it: shards or replicates.
        shape: The shape of the whole.
        stride: Its strides.
    """

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, whole: Any) -> Self:  # noqa: ANN401 - a DTensor, whose module is imported by those who shard only
        """Return the layout of a DTensor."""
        return cls(whole.device_mesh, tuple(whole.placements), whole.shape, tuple(whole.stride()))

    def wrap(self, local: Tensor) -> Tensor:
        """Return a DTensor of this layout over the memory of this rank's part."""
        from torch.distributed.tensor import DTensor

        # Without shape= and stride= the shape of unevenly sharded tensors would be guessed, and wrongly.
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def part(self, whole: Any) -> Tensor:  # noqa: ANN401 - as above, or a plain tensor
        """Return this rank's part of a DTensor of this layout, or of a whole tensor that all ranks have."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(whole, DTensor):
            return whole.to_local()
        # Torch 2.6 has no way to cut a tensor without asking rank 0 for it.
        alone = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
        moved = whole.to(self.mesh.device_type)
        return distribute_tensor(moved, self.mesh, self.placements, **alone).to_local()

    @property
    def replicas(self) -> Hashable:
        """What two ranks have in common that hold the same part; None where this rank holds none."""
        coordinate: Any = self.mesh.get_coordinate()
        if coordinate is None:
            return None
        sharded = [not placement.is_replicate() for placement in self.placements]
        return tuple(where if own else None for where, own in zip(coordinate, sharded, strict=True))

    def __str__(self) -> str:
        return f"({', '.join(map(repr, self.placements))}) on a mesh of {tuple(self.mesh.shape)} ranks"


def described(spread: Spread | None) -> str:
    """Return in words how a tensor is sharded."""
    return "a whole tensor" if spread is None else f"a DTensor {spread}"
