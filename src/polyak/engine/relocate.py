"""Another device, dtype or kind of memory for an average that is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polyak.engine.options import Options
from polyak.errors import AppliedError, ConfigError
from polyak.tensors.storage import Stored, as_device, as_dtype, storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.engine.core import Core

__all__ = ["pin", "refuse_fixed", "relocate"]


def relocate(core: Core, device: str | int | torch.device | None, dtype: str | torch.dtype | None) -> None:
    """Move what is averaged to a device, and convert it to a dtype; the same values, counts and history.

    Raises:
        ConfigError: If the device or dtype is none, or the average's place is fixed.
    """
    refuse_fixed(core, "to()")
    place = as_device(device)
    wanted = None if dtype is None else as_dtype(dtype)
    module = None if core.binding.home is None else core.binding.home.module
    if module is not None:
        module.to(device=place, dtype=None if wanted == "model" else wanted)
        return
    live = (
        {}
        if core.binding.plan is None
        else dict(zip(map(id, core.binding.plan.stored), core.binding.plan.live, strict=True))
    )

    def moved(stored: Stored) -> Stored:
        own = stored.average.dtype
        if dtype is not None and stored.policy == "average":
            weight = live.get(id(stored))
            own = storage_dtype(own if weight is None else weight.dtype, wanted)
        return stored.mapped(lambda tensor: tensor.to(device=place, dtype=own))

    changes = {} if place is None else {"device": str(place)}
    if dtype is not None:
        changes["dtype"] = "auto" if wanted is None else str(wanted).removeprefix("torch.")
    options = Options.model_validate({**core.options.model_dump(), **changes})
    try:
        _replace(core, moved)
    except (RuntimeError, AssertionError) as error:
        message = f"device: {str(place)!r} cannot be used on this machine: {str(error).splitlines()[0]}"
        raise ConfigError(message) from None
    core.settings = core.settings._replace(options=options)


def pin(core: Core) -> None:
    """Put averages of the CPU into page-locked memory.

    Raises:
        ConfigError: If there is no accelerator, whose driver locks pages, or the average's place is fixed.
    """
    refuse_fixed(core, "pin_memory()")
    if not torch.accelerator.is_available():
        message = "pin_memory() needs an accelerator, whose driver locks the memory; there is none on this machine"
        raise ConfigError(message)
    _replace(core, lambda stored: stored.mapped(lambda tensor: tensor.pin_memory() if tensor.is_cpu else tensor))


def refuse_fixed(core: Core, call: str) -> None:
    """Refuse to give an average other memory where something relies on what it has.

    Raises:
        AppliedError: If a model computes with the average.
        ConfigError: If it is spread over ranks, in a captured graph, or in tensors that its user keeps in a list.
    """
    if core.binding.is_entered:
        message = f"{call} while a model computes with the average; leave applied() first"
        raise AppliedError(message)
    home = core.binding.home
    reason = (
        "ranks share the average, which lives with the model's shards"
        if any(stored.spread for stored in core.state.stored)
        else "capturable=True, and a graph knows the average's memory; build a new averager"
        if core.options.capturable
        else "into= was given tensors of yours; move them yourself"
        if home is not None and home.module is None
        else ""
    )
    if reason:
        message = f"{call} is not possible: {reason}"
        raise ConfigError(message)


def _replace(core: Core, change: Callable[[Stored], Stored]) -> None:
    with torch.inference_mode(mode=False), torch.no_grad():
        made = [change(stored) for stored in core.state.stored]
    core.state.stored, core.binding.plan = made, None
