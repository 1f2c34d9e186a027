"""The state of an averager as tensors and plain types, and its way back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.engine.cadence import Progress
from polyak.engine.history import NO_LR, History
from polyak.engine.schema import FORMAT, SavedState
from polyak.errors import StateError
from polyak.errors.formatting import brief, listed
from polyak.strategy.base import Strategy, settings_of, variant
from polyak.tensors.generators import OwnGenerators
from polyak.tensors.sharding.placement import Spread, described
from polyak.tensors.wrappers import dtensor

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from polyak.engine.options import Options
    from polyak.tensors.storage import Stored

__all__ = ["State", "dump", "parse"]

_SHOWN = 6
_LATER = {"rounding": "stochastic", "seed": None}
"""Options that older files lack, and their defaults: distributed checkpoints refuse keys that a file does not have."""


@dataclass
class State:
    """All of an averager that changes: replaced as one object, so that a load is whole or absent."""

    stored: list[Stored]
    progress: Progress
    history: History
    skipped: int
    generators: OwnGenerators


def dump(state: State, holding: Sequence[Tensor], strategy: Strategy, options: Options) -> dict[str, Any]:
    """Return the state as tensors (copies) and plain types; what is spread over ranks as DTensors.

    ``torch.distributed.checkpoint`` takes mappings apart, needs each key in both the file and the averager that loads
    it, and takes no tensor of another length. So what differs between two averagers of one model is in tuples and
    lists, which it keeps whole.

    Args:
        state: The averager's state.
        holding: The tensors that hold the average now, one per stored tensor.
        strategy: The strategy.
        options: The engine's options.
    """
    kind, config = variant(strategy), options.model_dump(mode="json")
    return {
        "format": FORMAT,
        **({"class": kind} if kind else {}),
        "n": state.progress.n,
        "step": state.progress.step,
        "strategy": settings_of(strategy),
        "config": {name: value for name, value in config.items() if name not in _LATER or value != _LATER[name]},
        "slots": {
            "average": {s.name: s.whole(t.detach().clone()) for s, t in zip(state.stored, holding, strict=True)},
            **{
                slot: {s.name: s.whole(s.slots[slot].detach().clone()) for s in state.stored if slot in s.slots}
                for slot in strategy.slots()
            },
        },
        "aliases": [list(s.aliases) for s in state.stored if len(s.aliases) > 1],
        "progress": state.progress._asdict(),
        "history": (_dumped(state.history),),
        "skipped": state.skipped,
        "generators": tuple(state.generators.states().items()),
    }


def _dumped(history: History) -> dict[str, Any]:
    """Return a history by names; what most have not is left out."""
    columns = {"rates": torch.float64, "strides": torch.int64, "last": torch.int64}
    if any(lr != NO_LR for lr in history.lrs) or 0 in history.counted:
        columns |= {"lrs": torch.float64, "counted": torch.int8}
    identity = history.identity
    return {
        **{name: torch.tensor(getattr(history, name), dtype=dtype, device="cpu") for name, dtype in columns.items()},
        **({"held": history.held} if history.held else {}),
        **({"changes": [*map(list, history.changes)]} if history.changes else {}),
        **({"identity": {"start": identity.start, "marks": [*map(list, identity.marks)]}} if any(identity) else {}),
    }


def parse(saved: SavedState, current: State, slots: Sequence[str], optional: Container[str] = ()) -> State:
    """Return the state that was saved, on the devices of the current one; nothing is written.

    Args:
        saved: The saved state.
        current: The state of an averager of the same model.
        slots: The names of the strategy's slots.
        optional: Names of buffers that the state may have although the model has not filled them yet.

    Raises:
        StateError: If it is damaged, or belongs to another model.
    """
    try:
        return State(
            stored=_stored(saved.slots, current.stored, slots, optional),
            progress=Progress(**saved.progress.model_dump()),
            history=History(*saved.history),
            skipped=saved.skipped,
            generators=OwnGenerators(saved.generators, current.generators.seed),
        )
    except StateError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own, of tensors that cannot be copied
        message = f"the state is damaged or incomplete: {type(error).__name__}: {error}. Load the one before it."
        raise StateError(brief(message)) from error


def _stored(
    raw: Mapping[str, Mapping[str, Tensor]], current: Sequence[Stored], slots: Sequence[str], optional: Container[str]
) -> list[Stored]:
    averages = raw["average"]
    if {*raw} != {"average", *slots}:
        message = f"the state has the slots {listed(raw)}, and this averager {listed(['average', *slots])}"
        msg = f"{message}; build it with the settings that the state was saved with. Nothing was loaded."
        raise StateError(brief(msg))
    known = {s.name for s in current}
    # What follows the model needs no past, and begins anew where the state has none that fits.
    current = [s for s in current if not (s.follows and any(_problem(raw[slot], s) for slot in _slots(s, slots)))]
    problems = [
        problem if slot == "average" else f"{slot}: {problem}"
        for s in current
        for slot in _slots(s, slots)
        if (problem := _problem(raw[slot], s))
    ]
    strange = [name for name in averages if name not in known and name not in optional]
    # Integers and booleans were copied, and a copy is made of the next buffer that the model fills.
    problems += [f"unknown: {name}" for name in strange if _averaged(averages[name])]
    problems += [f"unknown: {name} in {slot!r}" for slot in slots for name in raw[slot] if name not in averages]
    if problems:
        shown = "\n  ".join(sorted(problems)[:_SHOWN])
        message = f"the state belongs to another model ({len(problems)} differences):\n  {shown}\nNothing was loaded."
        if all(problem.startswith("unknown") for problem in problems):
            message += " Buffers that the model fills later must be there first: load the model, or run one forward."
        if any(problem.startswith("spread") for problem in problems):
            message += " dcp.load and polyak.distributed.load cut and join tensors for the averager that loads them."
        raise StateError(brief(message))
    with torch.inference_mode(mode=False), torch.no_grad():
        return [
            replace(
                s,
                average=_received(averages[s.name], s),
                slots={slot: _received(raw[slot][s.name], s) for slot in _slots(s, slots)[1:]},
                fresh=False,
            )
            for s in current
        ]


def _averaged(tensor: object) -> bool:
    return not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex()


def _slots(stored: Stored, slots: Sequence[str]) -> Sequence[str]:
    return ("average", *slots) if stored.policy == "average" else ("average",)


def _problem(tensors: Mapping[str, Tensor], own: Stored) -> str:
    """Return why a tensor of a state does not fit, or an empty string."""
    name, average = own.name, own.average
    if name not in tensors:
        return f"missing: {name}"
    tensor = tensors[name]
    if not isinstance(tensor, Tensor):
        return f"damaged: {name} is {type(tensor).__name__} and no tensor"
    if spread := _spread_otherwise(tensor, own):
        return f"spread otherwise: {name} is {spread}"
    if tensor.shape != own.shape:
        return f"reshaped: {name} is {tuple(tensor.shape)}, expected {tuple(own.shape)}"
    if tensor.is_floating_point() != average.is_floating_point() or tensor.is_complex() != average.is_complex():
        return f"retyped: {name} is {tensor.dtype}, expected {average.dtype}"
    return ""


def _spread_otherwise(tensor: Tensor, own: Stored) -> str:
    """Return how a tensor is spread over ranks and how the averager's is, where these differ."""
    kind = dtensor()
    whole: Any = tensor
    spread = Spread.of(whole) if kind is not None and isinstance(whole, kind) else None
    if spread is None:
        return ""  # a sharded averager takes its part of it
    if own.spread is None:
        return f"{described(spread)}, expected {described(own.spread)}"
    # Strides say only how a whole one would lie.
    if (spread.mesh, spread.placements) != (own.spread.mesh, own.spread.placements):
        return f"{described(spread)}, expected {described(own.spread)}"
    # A file of one rank, read by another: the mesh in it remembers whose it is.
    part, wanted = spread.replicas, own.spread.replicas
    return "" if part == wanted else f"the part at {part} of the mesh, expected that at {wanted}"


def _received(tensor: Tensor, own: Stored) -> Tensor:
    if own.spread is not None:
        tensor = own.spread.part(tensor)
    # A float32 average is never cut down to a shorter dtype, whatever this averager would have chosen.
    wide = torch.promote_types(tensor.dtype, own.average.dtype) if own.policy == "average" else own.average.dtype
    return torch.empty_like(own.average, dtype=wide).copy_(tensor)
