"""The weights that ``applied()`` exchanges, on their way into a checkpoint beside the average, and back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from polyak.errors import StateError
from polyak.errors.formatting import listed
from polyak.tensors.entries import identity
from polyak.tensors.sharding.placement import Spread
from polyak.tensors.wrappers import dtensor
from polyak.tensors.writing import overwrite, writable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from polyak.engine import Engine
    from polyak.engine.averager import Averager

__all__ = ["copied", "is_sharded", "is_spread", "load_whole", "raw_weights", "restore"]


def is_sharded(averager: Averager) -> bool:
    """Return whether each rank holds only a part of the average."""
    return any(stored.spread is not None for stored in cast("Engine", averager).stored)


def is_spread(tensor: object) -> bool:
    """Return whether a tensor is this rank's part of a larger one."""
    kind = dtensor()
    return kind is not None and isinstance(tensor, kind)


def load_whole(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a state dict of whole tensors, which all ranks have, into a module that may be sharded."""
    own = module.state_dict()
    spread = {name: Spread.of(tensor) for name, tensor in own.items() if is_spread(tensor)}
    parts = {
        name: spread[name].wrap(spread[name].part(value)) if name in spread else value for name, value in state.items()
    }
    module.load_state_dict(parts, strict=strict)


def raw_weights(averager: Averager) -> dict[str, Tensor]:
    """Return copies of the model's own values of what is averaged or copied, by canonical names.

    The model must not hold the average.
    """
    return {name: tensor.detach().clone() for name, tensor in _live(averager).items()}


def restore(averager: Averager, weights: Mapping[str, Tensor]) -> None:
    """Write what ``raw_weights`` returned into the model.

    Raises:
        StateError: If a tensor is missing, unknown or has another shape. Nothing was written then.
    """
    live = _live(averager)
    problems = [f"missing: {name}" for name in live if name not in weights]
    problems += [f"unknown: {name}" for name in weights if name not in live]
    problems += [
        f"reshaped: {name} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in live.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        message = f"the raw weights in the checkpoint belong to another model: {listed(problems)}. Nothing was loaded."
        raise StateError(message)
    with torch.no_grad(), writable([*live.values()]):
        for name, tensor in live.items():
            overwrite(tensor, weights[name])


def _live(averager: Averager) -> dict[str, Tensor]:
    engine = cast("Engine", averager)
    kept = {stored.name for stored in engine.stored}
    return {entry.name: entry.tensor for entry in engine.entries() if entry.name in kept}


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with copies of its tensors on the CPU; names of one tensor share one copy.

    Sharded tensors stay where they are.
    """
    copies: dict[object, Tensor] = {}
    result: dict[str, Any] = copy.copy(cast("dict[str, Any]", state))  # with its attributes
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        memory = identity(value)
        if memory not in copies:
            kept = value.detach()
            copies[memory] = kept.clone() if is_spread(value) else kept.to("cpu", copy=True)
        result[name] = copies[memory]
    return result
