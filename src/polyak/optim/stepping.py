"""What an optimiser's steps are: its hooks, the optimiser inside that steps for it, steps that move nothing."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.optim import Optimizer

from polyak.errors import ConfigError
from polyak.errors.formatting import type_name

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["inner_optimizer", "makes_state", "refuse_shard", "run_last", "step_hooks", "unwrapped"]

_TRAINERS = frozenset({"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"})


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser inside the wrappers of Accelerate, Lightning and Fabric, which only decide when it steps.

    Other wrappers are returned as they are: they may write to the weights behind the inner step.
    """
    while any(base.__module__.partition(".")[0] in _TRAINERS for base in type(optimizer).__mro__):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer) or inner is optimizer:
            break
        optimizer = inner
    return optimizer


def step_hooks(optimizer: Optimizer) -> Mapping[int, object]:
    """Return the hooks behind an optimiser's steps.

    Raises:
        ConfigError: If it has none, or its ``step()`` does not run them.
    """
    # Which torch lists in no public way. A wrapper may inherit the methods that add to them, and have none.
    hooks: Mapping[int, object] | None = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if hooks is None:
        message = (
            f"got {type_name(optimizer)}, which has no step hooks; give the torch.optim.Optimizer itself "
            "(of a wrapper: its .optimizer), or call averager.update() yourself after each real step "
            "(DeepSpeed: after engine.step())"
        )
        raise ConfigError(message)
    if not getattr(type(optimizer).step, "hooked", False):
        message = (
            f"{type(optimizer).__name__}.step() runs no hooks, as torch.optim.Optimizer.__init__() was not called for "
            "it; call averager.update() yourself after each step"
        )
        raise ConfigError(message)
    return hooks


def inner_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """Return the one optimiser that another one holds and that steps its parameters (SAM's base optimiser)."""
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    held = [
        other
        for other in vars(optimizer).values()
        if isinstance(other, Optimizer)
        and other is not optimizer
        and not own.isdisjoint(id(param) for group in other.param_groups for param in group["params"])
    ]
    return held[0] if len(held) == 1 else None


def run_last(optimizer: Optimizer, number: int, kind: type) -> None:
    """Let a post hook run behind all others of an optimiser, except for those of its own kind."""
    hooks = optimizer._optimizer_step_post_hooks  # noqa: SLF001 - torch orders them in no public way
    for other in reversed(hooks):
        if other == number:
            return
        if not isinstance(hooks[other], kind):
            hooks[number] = hooks.pop(number)
            return


def refuse_shard(optimizer: Optimizer) -> None:
    """Refuse an optimiser that steps this rank's part of the parameters, which are broadcast after its steps.

    Raises:
        ConfigError: If a ``ZeroRedundancyOptimizer`` holds it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Only the caller knows the outer one, which holds the inner one: there is no cycle.
    owners = gc.get_referrers(optimizer)
    owners += [owner for held in owners if isinstance(held, dict) for owner in gc.get_referrers(held)]
    if any(isinstance(owner, ZeroRedundancyOptimizer) for owner in owners):
        message = (
            f"{type_name(optimizer)} steps one rank's part of the parameters for a ZeroRedundancyOptimizer, and the "
            "other parts come later; give the outer optimiser to polyak.attach(zero, averager), with an inner one of "
            "torch: ZeroRedundancyOptimizer(params, torch.optim.AdamW)"
        )
        raise ConfigError(message)


def makes_state(optimizer: Optimizer) -> bool:
    """Return whether a step is one that torch makes to have a state to load a checkpoint into: it moves nothing."""
    groups = optimizer.param_groups
    if any(group.get("lr") is None or float(group["lr"]) for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return not any(grad.is_sparse or bool(grad.any()) for grad in grads)
