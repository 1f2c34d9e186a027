"""What Lightning's checkpoints hold of an average: it is the module's state, with the raw weights beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from polyak.engine.export import gathered
from polyak.integrations.weights import copied, is_spread, load_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import Strategy

    from polyak.engine.averager import Averager

__all__ = ["add_raw", "load_raw", "save_average", "save_module"]

_RAW = "current_model_state"  # Lightning's own name
_STATE = "lightning_module_state_dict"


def save_average(strategy: Strategy, averager: Averager, is_ready: Callable[[], bool]) -> None:
    """Let a strategy give the average as its module's state, also for checkpoints of weights alone.

    Callbacks are not told of those.

    Args:
        strategy: The trainer's strategy.
        averager: The averager.
        is_ready: Whether there is an average that the module does not hold already.
    """

    def lightning_module_state_dict() -> dict[str, Any]:
        if not is_ready():
            return _state_of(strategy)
        with averager.applied():
            return copied(_state_of(strategy))

    setattr(strategy, _STATE, lightning_module_state_dict)


def save_module(strategy: Strategy) -> None:
    """Let a strategy give its module's own state again."""
    vars(strategy).pop(_STATE, None)


def add_raw(checkpoint: dict[str, Any], strategy: Strategy, key: str) -> None:
    """Add copies of the module's own weights to a checkpoint.

    Args:
        checkpoint: The checkpoint, whose ``state_dict`` is the average.
        strategy: The trainer's strategy, whose module holds its own weights.
        key: The key of the averager's state among those of the callbacks.
    """
    # Whole: of sharded models rank 0 writes this key alone.
    checkpoint[_RAW] = gathered(copied(_state_of(strategy)))
    own = checkpoint.get("callbacks", {}).get(key, {})
    if "slots" in own:
        _share(own["slots"]["average"], checkpoint["state_dict"])


def load_raw(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Load the raw weights of a checkpoint, if it holds any."""
    if _RAW in checkpoint:
        load_whole(module, checkpoint[_RAW], strict=module.strict_loading)


def _state_of(strategy: Strategy) -> dict[str, Any]:
    return cast("dict[str, Any]", getattr(type(strategy), _STATE)(strategy))


def _share(slots: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Let two mappings have the same tensors, so that a file holds them once."""
    for name, tensor in slots.items():
        same = state.get(name)
        if same is not None and not is_spread(same) and same.dtype == tensor.dtype and torch.equal(same, tensor.cpu()):
            slots[name] = same
