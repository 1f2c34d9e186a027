"""Averages of other libraries, taken over: their objects, state dicts and files as tensors and a count of updates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak.engine.cadence import Progress
from polyak.engine.history import History
from polyak.engine.state import State
from polyak.errors import AppliedError, ConfigError, MissingFileError, StateError
from polyak.errors.formatting import listed, shown
from polyak.strategy.base import Strategy
from polyak.strategy.numbers import as_integer
from polyak.tensors.entries import walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.engine.core import Core
    from polyak.engine.settings import Settings
    from polyak.tensors.storage import Stored

__all__ = ["Received", "Takeover", "taken_over"]

_SHOWN = 6
_MODULES = ("module", "ema_model", "ema", "average", "_average_model")
"""Attributes that hold the average's module, in torch's, timm's, ema-pytorch's and other classes."""
_DICTIONARIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Keys that hold the average's state dict in checkpoints of scripts."""
_PREFIXES = ("ema_model.", "module.")
_COUNTS = ("n_averaged", "num_updates", "optimization_step", "step")


class Received(NamedTuple):
    """A state that fits an averager."""

    settings: Settings
    state: State


class Takeover(NamedTuple):
    """What was found.

    Attributes:
        tensors: The averages by name; None where they came in order.
        order: The averages in order; None where they came by name.
        n: How many updates they have, if that is known.
    """

    tensors: Mapping[str, Tensor] | None
    order: Sequence[Tensor] | None
    n: int | None

    @classmethod
    def of(cls, source: Any) -> Takeover:  # noqa: ANN401 - whatever holds an average
        """Return the average that a source holds.

        Raises:
            StateError: If it holds no average that is known.
            MissingFileError: If a file is not there.
        """
        if isinstance(source, (str, os.PathLike)):
            return cls.of(_read(Path(source)))
        if isinstance(source, Mapping):
            return _of_mapping(source)
        count = _count({name: getattr(source, name) for name in _COUNTS if hasattr(source, name)})
        if isinstance(shadow := getattr(source, "shadow_params", None), list):
            return cls(None, shadow, count)
        for name in _MODULES:
            if isinstance(module := getattr(source, name, None), nn.Module):
                return cls(_named(module), None, count)
        if isinstance(source, nn.Module):
            return cls(_named(source), None, None)
        if isinstance(source, Iterable):
            tensors = [*source]
            if tensors and all(isinstance(tensor, Tensor) for tensor in tensors):
                return cls(None, tensors, None)
        message = (
            f"take_over() found no average in {shown(source)}; expected an averaging object, a state dict or a file of "
            "timm, torch, torch_ema, diffusers, ema-pytorch or Lightning, a module, or tensors"
        )
        raise StateError(message)

    def matched(self, stored: Sequence[Stored]) -> list[Tensor | None]:
        """Return the tensor for each that is stored; None for a buffer that is not there.

        Raises:
            StateError: If a parameter is missing, or a shape differs.
        """
        if self.order is not None:
            found = self._in_order(stored)
        else:
            names = self.tensors or {}
            found = [next((names[alias] for alias in s.aliases if alias in names), None) for s in stored]
        problems = [
            f"{s.name} is missing"
            if tensor is None
            else f"{s.name} has shape {tuple(tensor.shape)}, not {tuple(s.shape)}"
            for s, tensor in zip(stored, found, strict=True)
            if (tensor is None and s.kind == "parameter") or (tensor is not None and tensor.shape != s.shape)
        ]
        if problems:
            message = f"what take_over() was given belongs to another model: {listed(problems[:_SHOWN])}"
            raise StateError(message)
        return found

    def _in_order(self, stored: Sequence[Stored]) -> list[Tensor | None]:
        given = [*(self.order or ())]
        parameters = [s for s in stored if s.kind == "parameter"]
        chosen = parameters if len(given) == len(parameters) else [*stored]
        if len(given) != len(chosen):
            message = f"take_over() got {len(given)} tensors; expected one for each of {len(parameters)} parameters"
            raise StateError(message)
        by_id = {id(s): tensor for s, tensor in zip(chosen, given, strict=True)}
        return [by_id.get(id(s)) for s in stored]


def taken_over(core: Core, taken: Takeover, n: int) -> Received:
    """Return the state of an averager that goes on from what was found; nothing is changed.

    Raises:
        StateError: If it belongs to another model.
        ConfigError: If the strategy keeps several tensors, or ranks share the average.
        AppliedError: If a model computes with the average.
    """
    if core.strategy.slots():
        message = (
            f"take_over(): the strategy {core.strategy.name!r} keeps several tensors, and other libraries keep one"
        )
        raise ConfigError(message)
    if n and type(core.strategy).weight is not Strategy.weight:
        message = (
            f"take_over(): the strategy {core.strategy.name!r} weighs updates, and no library keeps the weights of the "
            f"{n} before; give n=0, which begins the count anew"
        )
        raise ConfigError(message)
    if core.binding.is_entered:
        message = "take_over() inside applied(), where the model holds the average; leave applied() first"
        raise AppliedError(message)
    core.settle()
    state = core.state
    if any(s.spread for s in state.stored):
        message = "take_over() of an average that ranks share is not possible; load a state of polyak's"
        raise ConfigError(message)
    with torch.inference_mode(mode=False), torch.no_grad():
        stored = [
            s if tensor is None else replace(s, average=s.average.clone().copy_(tensor), fresh=False)
            for s, tensor in zip(state.stored, taken.matched(state.stored), strict=True)
        ]
    # A rate of 0 leaves the start what it is: which updates it consists of is not known.
    history, steps = History(), n * core.options.every
    if n:
        history.record(n, 0.0, core.options.every)
    progress = Progress(n, n, steps, steps, steps, float(n), 0.0) if n else Progress()
    return Received(core.settings._replace(changes=()), State(stored, progress, history, 0, state.generators))


def _of_mapping(source: Mapping[Any, Any]) -> Takeover:
    if isinstance(shadow := source.get("shadow_params"), list):
        return Takeover(None, shadow, _count(source))
    if isinstance(source.get("averaging_state"), Mapping) and isinstance(source.get("state_dict"), Mapping):
        return Takeover(_tensors(source["state_dict"]), None, _count(source["averaging_state"]))  # Lightning's
    for key in _DICTIONARIES:
        if isinstance(inner := source.get(key), Mapping):
            return _of_mapping(inner)
    names = _tensors(source)
    for prefix in _PREFIXES:
        own = {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}
        if own:
            return Takeover(own, None, _count(source))
    if not names:
        message = f"take_over() found no tensors in a mapping with the keys {listed([*map(str, source)][:_SHOWN])}"
        raise StateError(message)
    return Takeover(names, None, None)


def _tensors(source: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in source.items() if isinstance(value, Tensor)}


def _named(module: nn.Module) -> Mapping[str, Tensor]:

    return {alias: entry.tensor for entry in walk(module) for alias in entry.aliases}


def _count(values: Mapping[Any, Any]) -> int | None:
    for name in _COUNTS:
        if name in values and (number := as_integer(values[name])) is not None and number >= 0:
            return number
    return None


def _read(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    if not path.exists():
        message = f"the file {str(path)!r} is not there"
        raise MissingFileError(message)
    if path.is_dir() or path.suffix == ".safetensors":
        message = (
            f"{str(path)!r} is a folder or a safetensors file; load its tensors and give them: "
            "take_over(safetensors.torch.load_file(path)), or diffusers' EMAModel.from_pretrained(path, ...)"
        )
        raise StateError(message)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises of a damaged file
        message = f"the file {str(path)!r} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise StateError(message) from error
