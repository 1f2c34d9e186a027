"""The average on its way out: into a model for good, or as a state dict that loads anywhere."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak.ranks.consensus import first_rank, ranks_of
from polyak.ranks.unresponsive import answered
from polyak.tensors.entries import identity, walk
from polyak.tensors.swap import forget_computed
from polyak.tensors.wrappers import dtensor, plain_name, unwrap
from polyak.tensors.writing import overwrite, writable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from polyak.engine.plan.plan import Plan

__all__ = ["averaged_state_dict", "gathered", "overwrite_model", "whole_state"]


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
            forget_computed()
            plan.adapter.after_swap(plan.model)


def _write(plan: Plan, holding: Sequence[Tensor]) -> None:
    for live, average in zip(plan.live, holding, strict=True):
        overwrite(live, average)


def averaged_state_dict(
    plan: Plan, holding: Sequence[Tensor], applied: Callable[[], AbstractContextManager[None]]
) -> dict[str, Any]:
    """Return the model's state dict with the averages in the place of its tensors, all copies.

    All names of one tensor get one copy, as in the model's own state dict: a file holds it once.

    Args:
        plan: The plan of the averager's own model.
        holding: The tensors that hold the average now, one per entry of the plan.
        applied: Puts the average into the model, for state dicts that compute new tensors from its weights.
    """
    averages = {
        id(location.tensor): (stored, average)
        for entry, stored, average in zip(plan.entries, plan.stored, holding, strict=True)
        for location in entry.locations
    }
    copies: dict[object, Tensor] = {}

    def copied(live: Tensor) -> Tensor:
        memory = identity(live)
        if memory not in copies:
            if id(live) in averages:
                stored, average = averages[id(live)]
                kept = average.detach().to(device=live.device, dtype=live.dtype, copy=True)
                copies[memory] = stored.whole(kept)
            else:
                copies[memory] = live.detach().clone()
        return copies[memory]

    model = plan.model
    if not isinstance(model, nn.Module):
        return {name: copied(live) for name, live in model.items()}
    own = {id(location.tensor) for entry in walk(model) for location in entry.locations}
    model = unwrap(model)
    # Filled in place: it carries the versions of its modules, which load_state_dict reads.
    result: dict[str, Any] = model.state_dict(keep_vars=True) if _keeps_variables(model) else {}
    # A hook or the model's own state_dict() made all other tensors, perhaps of its weights.
    computed = [key for key, value in result.items() if id(value) not in own and _has_tensors(value)]
    result.update({key: copied(value) for key, value in result.items() if id(value) in own})
    if computed or not result:
        made: dict[object, Tensor] = {}
        with applied(), torch.no_grad():
            now = model.state_dict()
            result = result or now
            result.update({key: _cloned(now[key], made) for key in computed or [*now]})
    return _without_wrappers(model, result)


def _without_wrappers(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Rename what compiled or checkpointed blocks hold, in place, so that the plain model can load it."""
    for named in (state, getattr(state, "_metadata", {})):
        names = [plain_name(model, name) for name in named]
        if names != [*named]:
            renamed = dict(zip(names, named.values(), strict=True))  # of a wrapper and its module the module stays
            named.clear()
            named.update(renamed)
    return state


def _keeps_variables(model: nn.Module) -> bool:
    """Return whether the model's ``state_dict()``, which may be its own, can be asked for the tensors themselves."""
    try:
        inspect.signature(model.state_dict).bind(keep_vars=True)
    except (TypeError, ValueError):
        return False
    return True


def _has_tensors(value: object) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_has_tensors, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _cloned(value: Any, copies: dict[object, Tensor]) -> Any:  # noqa: ANN401 - whatever a state dict holds
    if isinstance(value, Tensor):
        memory = identity(value)
        if memory not in copies:
            copies[memory] = value.detach().clone()
        return copies[memory]
    if isinstance(value, dict):
        new = copy.copy(value)  # with its attributes
        new.update({key: _cloned(one, copies) for key, one in value.items()})
        return new
    if type(value) in {list, tuple}:
        return type(value)([_cloned(one, copies) for one in value])
    return value


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with whole tensors on the CPU of rank 0, and ``{}`` on the others; without DTensors as it is.

    Rank 0 is the first of those that share the model. One tensor at a time is gathered.

    Raises:
        DistributedError: If a rank is gone.
    """
    kind = dtensor()
    spread = [value for value in state.values() if kind is not None and isinstance(value, kind)]
    if not spread:
        return state
    meshes = [value.device_mesh for value in spread]
    first = first_rank(meshes) == torch.distributed.get_rank()
    with answered("gather the average", "All ranks call it with full=True.", ranks=ranks_of(meshes)):
        for key, value in state.items():
            whole = value.full_tensor() if isinstance(value, kind) else value
            state[key] = whole.cpu() if first and isinstance(whole, Tensor) else whole if first else None
    return state if first else {}


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return an averager's state with whole tensors on the CPU of rank 0, and ``{}`` on the others.

    Raises:
        DistributedError: If a rank is gone.
    """
    slots = {slot: gathered(tensors) for slot, tensors in state["slots"].items()}
    return {**state, "slots": slots} if slots["average"] else {}
