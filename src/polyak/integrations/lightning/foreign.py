"""Averages of Lightning's own callbacks in a checkpoint, as states to go on from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyak.tensors.wrappers import plain_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from polyak.config import AveragerConfig
    from polyak.engine.averager import Averager

__all__ = ["continued", "updates_of"]


def updates_of(checkpoint: Mapping[str, Any]) -> int:
    """Return how many updates the average of Lightning's ``WeightAveraging`` in a checkpoint took; 0 without one."""
    averaging = checkpoint.get("averaging_state")
    if "current_model_state" not in checkpoint or not isinstance(averaging, dict):
        return 0
    return int(averaging.get("n_averaged", 0))


def continued(
    averager: Averager, config: AveragerConfig, module: nn.Module, average: Mapping[str, Any], updates: int
) -> dict[str, Any]:
    """Return the state of an averager that made so many updates and holds these tensors.

    Args:
        averager: A new averager of the module.
        config: Its config.
        module: The module.
        average: The averaged tensors by the names of the module's state dict.
        updates: How many updates made them.
    """
    # Counters and history are those of as many updates of one number, by the same strategy.
    counted = config.model_copy(update={"include": None, "exclude": None, "buffers": "auto", "device": None})
    small = counted.build({"weight": torch.zeros(1, device="cpu")})
    while small.n < updates:
        small.update()
    state, own = small.state_dict(), averager.state_dict()
    slots = own["slots"]["average"]
    for name, tensor in average.items():
        if (plain := plain_name(module, name)) in slots:
            slots[plain].copy_(tensor)
    return {**state, **{key: own[key] for key in ("slots", "config", "aliases", "generators")}}
