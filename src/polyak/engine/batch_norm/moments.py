"""Mean and variance of the rows that reach a batch norm layer, on one rank or on several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from polyak.ranks.unresponsive import answered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.nn.modules.batchnorm import _BatchNorm

    from polyak.tensors.sharding.adapter import Peers

__all__ = ["Moments", "joined"]


class Moments:
    """The count, mean and sum of squared deviations of all rows so far, per channel, in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.batches = 0, 0
        self.mean = torch.zeros((), dtype=torch.float64, device="cpu")
        self.squares = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Count the rows of what a layer was given."""
        rows = x.detach().movedim(1, 0).flatten(1)
        count = rows.shape[1]
        if not count:
            return
        variance, mean = torch.var_mean(rows if rows.dtype == torch.float64 else rows.float(), dim=1, correction=0)
        # Per channel only: in float64 on the CPU, since not every device has it.
        variance, mean = variance.to("cpu", torch.float64), mean.to("cpu", torch.float64)
        total, delta = self.count + count, mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / total)
        self.count, self.batches = total, self.batches + 1

    def write(self, layer: _BatchNorm, *, lost: int) -> None:
        """Write the statistics, the variance with so many degrees of freedom lost."""
        if layer.running_mean is None or layer.running_var is None or not self.count:
            return
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.squares / max(1, self.count - lost))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(self.batches)


def joined(measured: Mapping[_BatchNorm, Moments], peers: Peers) -> None:
    """Let each rank have the moments of all ranks' rows, the same bits on all of them.

    Raises:
        DistributedError: If a rank does not answer.
    """

    def total(parts: list[Tensor]) -> list[Tensor]:
        joint = torch.cat(parts).to(peers.device)
        for group in peers.groups:
            dist.all_reduce(joint, group=group)
        return [*joint.cpu().split_with_sizes([len(part) for part in parts])]

    with answered("measure the statistics of batch norm", "All ranks call recalibrate().", ranks=peers.ranks):
        rows = total([torch.tensor([m.count, m.batches], dtype=torch.float64, device="cpu") for m in measured.values()])
        means = total([m.mean.expand(layer.num_features) * m.count for layer, m in measured.items()])
        means = [mean / max(1.0, float(count)) for mean, (count, _) in zip(means, rows, strict=True)]
        apart = zip(measured.values(), means, strict=True)
        squares = total([(mean - m.mean).square() * m.count + m.squares for m, mean in apart])
    for m, (count, batches), mean, square in zip(measured.values(), rows, means, squares, strict=True):
        m.count, m.batches, m.mean, m.squares = int(count), int(batches), mean, square
