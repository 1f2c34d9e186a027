"""The average on its way out: into a model for good, or as a state dict that loads anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak.tensors.agreement import first_rank, ranks_of
from polyak.tensors.entries import walk
from polyak.tensors.roll_call import answered
from polyak.tensors.swap import overwrite, writable
from polyak.tensors.wrappers import dtensor, unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from polyak.tensors.plan import Plan

__all__ = ["averaged_state_dict", "gathered", "overwrite_model"]


def overwrite_model(plan: Plan, holding: Sequence[Tensor]) -> None:
    """Write the average over a model's weights; an interruption is raised only when all are written."""
    with writable(plan.live):
        try:
            _write(plan, holding)
        except BaseException:
            # Writing twice is writing once, and half an average is no model.
            _write(plan, holding)
            raise
        finally:
            torch.clear_autocast_cache()  # an enclosing autocast keeps casts of the values before
            plan.adapter.after_swap(plan.model)


def _write(plan: Plan, holding: Sequence[Tensor]) -> None:
    for live, average in zip(plan.live, holding, strict=True):
        overwrite(live, average)


def averaged_state_dict(
    plan: Plan, holding: Sequence[Tensor], applied: Callable[[], AbstractContextManager[None]]
) -> dict[str, Any]:
    """Return the model's state dict with the averages in the place of its tensors, all copies.

    Args:
        plan: The plan of the averager's own model.
        holding: The tensors that hold the average now, one per entry of the plan.
        applied: Puts the average into the model, for state dict hooks that compute new tensors from its weights.
    """
    averages = {
        id(slot.tensor): (stored, average)
        for entry, stored, average in zip(plan.entries, plan.stored, holding, strict=True)
        for slot in entry.slots
    }

    def copied(live: Tensor) -> Tensor:
        if id(live) not in averages:
            return live.detach().clone()
        stored, average = averages[id(live)]
        return stored.whole(average.detach().to(device=live.device, dtype=live.dtype, copy=True))

    model = plan.model
    if not isinstance(model, nn.Module):
        return {name: copied(live) for name, live in model.items()}
    # What is left alone is the model's own; only what is no tensor of the model was computed by a hook.
    own = {id(slot.tensor) for entry in walk(model) for slot in entry.slots}
    # Filled in place: it carries the versions of its modules, which load_state_dict reads.
    model = unwrap(model)
    result: dict[str, Any] = model.state_dict(keep_vars=True)
    computed = [key for key, v in result.items() if isinstance(v, Tensor) and id(v) not in own]
    result.update({key: copied(v) for key, v in result.items() if id(v) in own})
    if computed:
        with applied(), torch.no_grad():
            now = model.state_dict()
            result.update({key: now[key].detach().clone() for key in computed})
    return result


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with whole tensors on the CPU of rank 0, and ``{}`` on the others; without DTensors as it is.

    Rank 0 is the first of those that share the model. One tensor at a time is gathered.

    Raises:
        DistributedError: A rank is gone.
    """
    kind = dtensor()
    spread = [value for value in state.values() if kind is not None and isinstance(value, kind)]
    if not spread:
        return state
    meshes = [value.device_mesh for value in spread]
    first = first_rank(meshes) == torch.distributed.get_rank()
    with answered("gather the average", "All ranks call averaged_state_dict(full=True).", ranks=ranks_of(meshes)):
        for key, value in state.items():
            whole = value.full_tensor() if isinstance(value, kind) else value
            state[key] = whole.cpu() if first and isinstance(whole, Tensor) else whole if first else None
    return state if first else {}
