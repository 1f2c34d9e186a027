"""What a recorder follows: averages that can be recorded, their model, and the means of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from polyak.engine import Engine
from polyak.engine.bank import Bank
from polyak.engine.options import Options
from polyak.errors import ConfigError, MismatchError, UnboundError
from polyak.errors.calls import warn_user
from polyak.errors.formatting import shown
from polyak.posthoc.snapshot import Layout
from polyak.strategy import SWA
from polyak.tensors.wrappers import plain_name, unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Size, Tensor

    from polyak.engine.averager import Averager
    from polyak.engine.nonfinite import Nonfinite
    from polyak.tensors.entries import Model

__all__ = [
    "are_steps",
    "block_means",
    "digested_of",
    "engines_of",
    "fastest_of",
    "frozen_of",
    "last_before",
    "layout_of",
    "model_of",
    "refuse_growth",
    "shapes_of",
    "start_of",
    "warn_unclosed",
    "weights_of",
]


def engines_of(averager: Averager | Bank) -> dict[str, Engine]:
    """Return the averages by the names that their snapshots get.

    Raises:
        ConfigError: If ``averager`` is not an averager, or its updates cannot be followed.
    """
    named = dict(averager) if isinstance(averager, Bank) else {"average": averager}
    for name, one in named.items():
        if not isinstance(one, Engine):
            message = f"got {type(one).__name__}; expected what polyak.average() or polyak.bank() returned"
            raise ConfigError(message)
        if one.options.capturable:
            message = (
                f"{name} is updated inside a captured graph, unseen by a recorder; build it without capturable=True"
            )
            raise ConfigError(message)
    engines = cast("dict[str, Engine]", named)
    averaged = {name: _averaged(engine) for name, engine in engines.items()}
    first = next(iter(averaged))
    for name, tensors in averaged.items():
        if tensors != averaged[first]:
            message = f"{name!r} averages other tensors than {first!r}; record averages of different tensors one by one"
            raise ConfigError(message)
    return engines


def model_of(engine: Engine) -> Model:
    """Return the model, without wrappers.

    Raises:
        UnboundError: If the averager has no model.
    """
    if engine.model is None:
        message = "the averager has no model (it was unpickled); update it once, then record it"
        raise UnboundError(message)
    return engine.model


def layout_of(engine: Engine) -> Layout:
    """Return the keys, names and dtypes of the model's state dict, which an average is loaded into."""
    model = model_of(engine)
    entries = engine.entries()
    names = {id(location.tensor): entry.name for entry in entries for location in entry.locations}
    tensors: Mapping[str, Tensor] = model if not isinstance(model, nn.Module) else _plain_state_dict(unwrap(model))
    keys = {key: names[id(tensor)] for key, tensor in tensors.items() if id(tensor) in names}
    if left := [key for key in tensors if key not in keys]:
        warn_user(
            f"the model's state dict has {len(left)} entries that are no tensors of it and in no snapshot, {left[0]!r} "
            "among them; load what is synthesised with strict=False"
        )
    kept = {*keys.values()}
    dtypes = {entry.name: str(entry.tensor.dtype).removeprefix("torch.") for entry in entries if entry.name in kept}
    return Layout(keys, dtypes, [name for name in _averaged(engine) if name in kept])


def digested_of(engine: Engine, layout: Layout) -> list[str]:
    """Return the canonical names of the tensors that identify an average.

    Those are its parameters: under DDP each rank has statistics of its own batches.
    """
    parameters = {s.name for s in engine.stored if s.kind == "parameter"}
    return [name for name in layout.averaged if name in parameters] or layout.averaged


def frozen_of(engine: Engine, layout: Layout) -> list[str]:
    """Return the canonical names of the frozen parameters of a model that has trained ones, too."""
    parameters = [entry for entry in engine.entries() if entry.kind == "parameter" and entry.name in layout.dtypes]
    frozen = [
        entry.name for entry in parameters if not any(location.tensor.requires_grad for location in entry.locations)
    ]
    return frozen if len(frozen) < len(parameters) else []  # a mapping of tensors does not say what is trained


def _plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(model, key): value for key, value in model.state_dict(keep_vars=True).items()}


def shapes_of(engine: Engine) -> dict[str, Size]:
    """Return the shape of each average that is in the model's state dict, the same in all snapshots."""
    return {s.name: s.shape for s in engine.stored if s.persistent and s.policy == "average"}


def refuse_growth(engine: Engine, shapes: Mapping[str, Size]) -> None:
    """Refuse an average that cannot be combined with what was recorded before.

    Raises:
        MismatchError: If an average came, went or changed shape since.
    """
    now = shapes_of(engine)
    if changed := sorted(name for name in now.keys() | shapes.keys() if now.get(name) != shapes.get(name)):
        message = (
            f"{changed[0]} came, went or changed shape while it was recorded, and no average of such snapshots means "
            "anything; build the recorder after the first forward, or copy this buffer: buffers={name: 'copy'}"
        )
        raise MismatchError(message)


def weights_of(engine: Engine, layout: Layout) -> dict[str, Tensor]:
    """Return an average of a model's state dict by canonical name; what it leaves alone is the model's own.

    Raises:
        MismatchError: If the model dropped a tensor.
    """
    live = {entry.name: entry.locations[0].tensor for entry in engine.entries()}
    if gone := [name for name in layout.dtypes if name not in live]:
        message = f"{gone[0]} is no longer in the model, and all snapshots are of one; record into another folder"
        raise MismatchError(message)
    averages = engine.averages
    return {name: averages.get(name, live[name]) for name in layout.dtypes}


def start_of(engine: Engine, layout: Layout) -> dict[str, Tensor]:
    """Return the weights that an average without updates starts from; what it leaves alone is the model's own."""
    own = {s.name: s.whole(s.average) for s in engine.stored}
    live = {entry.name: entry.locations[0].tensor for entry in engine.entries()}
    return {name: own.get(name, live[name]) for name in layout.dtypes}


def fastest_of(engines: Mapping[str, Engine]) -> str:
    """Return the name of the average that is updated most often, and from the earliest step on."""
    return min(engines, key=lambda name: (engines[name].options.every, engines[name].options.start))


def last_before(step: int, engines: Mapping[str, Engine]) -> int:
    """Return the last optimiser step before this one at which any of the averages was updated; -1: none."""
    steps = [int(one) for engine in engines.values() for one in engine.profile().steps[-2:] if one < step]
    return max(steps, default=-1)


def block_means(engines: Mapping[str, Engine], wanted: bool | None) -> Engine | None:  # noqa: FBT001 - as in Recorder
    """Return an averager of the weights of each block, or None if none is wanted.

    Raises:
        ConfigError: If ``wanted`` is none of the three, or an average is updated in the background.
    """
    if wanted not in (None, True, False):
        message = f"blocks: got {shown(wanted)}; expected True, False or None. A block has the length every="
        raise ConfigError(message)
    fastest = engines[fastest_of(engines)]
    offloaded = any(engine.offloaded for engine in engines.values())
    if wanted is None:
        kinds = {engine.strategy.name for engine in engines.values()}
        wanted = not offloaded and "block_mean" not in kinds and kinds != {"power"}
    if not wanted:
        return None
    if offloaded:
        message = (
            "blocks=True reads the weights after each update, and this one runs later, in the background; put "
            'block means into the bank: {"blocks": {"name": "block_mean", "length": every}}'
        )
        raise ConfigError(message)
    own = fastest.options
    # What the averages have looked at, or hold, is looked at no second time.
    nonfinite: Nonfinite = "hold" if own.nonfinite == "hold" else "propagate" if fastest.core.checks else "skip"
    options = Options(
        every=own.every, origin="first", buffers=own.buffers, include=own.include, exclude=own.exclude,
        match=own.match, nonfinite=nonfinite,
    )  # fmt: skip
    return Engine(model_of(fastest), SWA(), options)


def are_steps(state: Mapping[str, Any]) -> bool:
    """Return whether the series that were seen and written are names with optimiser steps."""
    return all(
        isinstance(steps, dict) and all(type(name) is str and type(step) is int for name, step in steps.items())
        for steps in (state["seen"], state["written"])
    )


def warn_unclosed(directory: Path, seen: Mapping[str, int], written: Mapping[str, int]) -> None:
    """Warn of updates that a recorder has seen and not written."""
    late = [name for name, step in seen.items() if step > written.get(name, -1)]
    if late:
        first, last = min(written.get(name, 0) for name in late), max(seen[name] for name in late)
        message = (
            f"a Recorder of {str(directory)!r} was never closed: no snapshot holds the updates after step {first}, up "
            f"to step {last}. Use it in a with statement, or call close()."
        )
        warn_user(message)


def _averaged(engine: Engine) -> list[str]:
    return [stored.name for stored in engine.stored if stored.policy == "average"]
