"""The states of averagers and banks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from operator import mul
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor

from polyak.engine.history import Change, Identity
from polyak.engine.migrations import upgraded
from polyak.errors import StateError
from polyak.errors.formatting import shown
from polyak.io.schema import LARGEST, Count, Moment, Schema, Settings, checked, held, plain

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FORMAT", "SavedState", "check_bank"]

FORMAT = 2
_SHOWN = 6


class _History(NamedTuple):
    """What ``polyak.engine.history.History`` is made from."""

    rates: list[float]
    strides: list[int]
    last: list[int]
    changes: tuple[Change, ...]
    identity: Identity
    lrs: list[float]
    counted: list[int]
    held: int


_COLUMNS = {"rates": None, "strides": torch.int64, "last": torch.int64, "lrs": None, "counted": torch.int8}
_MORE = ("lrs", "counted")  # of histories in which a strategy used a learning rate, or steps were given


def _history(raw: Any) -> _History:  # noqa: ANN401 - a validator takes whatever there is
    """Return the runs of a history, and the settings that were changed on the way.

    Raises:
        ValueError: If it is no history.
    """
    if not isinstance(raw, (list, tuple)) or len(raw) != 1 or not isinstance(raw[0], Mapping):
        message = "expected one mapping in a tuple"
        raise ValueError(message)
    named = dict(raw[0])
    columns = {name: named.pop(name) for name in _COLUMNS if name in named}
    if len({*columns} & {*_MORE}) == 1 or {*_COLUMNS} - {*_MORE} - {*columns}:
        message = f"got the columns {', '.join(columns) or '(none)'}; expected {', '.join(_COLUMNS)}"
        raise ValueError(message)
    _check_columns(columns)
    changes, identity = _changes(named.pop("changes", ())), _identity(named.pop("identity", None))
    kept = named.pop("held", 0)
    if named:
        message = f"unknown: {_names(named)}; if a newer polyak wrote it, upgrade polyak"
        raise ValueError(message)
    rates, strides, last, lrs, counted = (columns[name].tolist() if name in columns else [] for name in _COLUMNS)
    if not all(0.0 <= rate <= 1.0 for rate in rates):
        message = "a rate is no number in [0, 1]"
        raise ValueError(message)
    if min(strides, default=1) < 1 or any(b <= a for a, b in pairwise([0, *last])):
        message = "a stride is less than 1, or a run ends before it begins"
        raise ValueError(message)
    if any(math.isnan(lr) for lr in lrs) or not {*counted} <= {0, 1}:
        message = "a learning rate is NaN, or whether a step was counted is neither 0 nor 1"
        raise ValueError(message)
    if type(kept) is not int or not 0 <= kept <= (last[-1] if last else 0):
        message = f"it counts {shown(kept)} updates that kept old values; expected as many as there are, or fewer"
        raise ValueError(message)
    return _History(rates, strides, last, changes, identity, lrs, counted, kept)


def _check_columns(columns: Mapping[str, Any]) -> None:
    """Refuse what are no columns of one table of runs.

    Raises:
        ValueError: If one is no tensor, or has another dtype or length.
    """
    for name, tensor in columns.items():
        dtype = _COLUMNS[name]
        if not isinstance(tensor, Tensor) or tensor.dim() != 1 or not held(tensor):
            message = f"{name}: expected a tensor of one dimension"
            raise ValueError(message)
        if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
            message = f"{name}: got the dtype {tensor.dtype}; expected {dtype or torch.float64}"
            raise ValueError(message)
    if len({len(tensor) for tensor in columns.values()}) != 1:
        message = f"got {', '.join(f'{len(tensor)} {name}' for name, tensor in columns.items())}"
        raise ValueError(message)


def _changes(raw: Any) -> tuple[Change, ...]:  # noqa: ANN401 - a validator takes whatever there is
    """Return the settings that were changed in the middle of a run.

    Raises:
        ValueError: If they are something else.
    """
    plain(raw)
    if not isinstance(raw, (list, tuple)) or not all(isinstance(one, (list, tuple)) for one in raw):
        message = "expected lists of changed settings"
        raise ValueError(message)
    if not all(len(one) == len(Change._fields) and type(one[0]) is int and type(one[1]) is str for one in raw):
        message = "a changed setting is no count, name and two values"
        raise ValueError(message)
    return tuple(Change(*one) for one in raw)


def _identity(raw: Any) -> Identity:  # noqa: ANN401 - a validator takes whatever there is
    """Return the identity of a history.

    Raises:
        ValueError: If it is something else.
    """
    if raw is None:  # nothing was recorded
        return Identity()
    start, marks = (raw.get(name) if isinstance(raw, Mapping) else None for name in Identity._fields)
    if type(start) is not str or not isinstance(marks, (list, tuple)):
        message = "its identity is no digest of a start with marks"
        raise ValueError(message)
    pairs = [tuple(mark) if isinstance(mark, (list, tuple)) else () for mark in marks]
    if [[*map(type, pair)] for pair in pairs] != [[int, str]] * len(pairs):
        message = "a mark of its identity is no step with a digest"
        raise ValueError(message)
    return Identity(start, tuple(pairs))


def _counted(config: Mapping[str, Any]) -> Mapping[str, Any]:
    _Options.model_validate(dict(config))
    return config


def _generators(raw: Any) -> dict[str, Tensor]:  # noqa: ANN401 - a validator takes whatever there is
    """Return the states of random generators by their devices.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(raw, (Mapping, list, tuple)):
        message = "expected pairs of a device and a state"
        raise ValueError(message)  # noqa: TRY004 - pydantic locates only these
    states: dict[Any, Any] = dict(raw)
    for name, state in states.items():
        if type(name) is not str or not isinstance(state, Tensor) or state.dtype != torch.uint8 or not held(state):
            message = f"the generator of {shown(name)} has no tensor of bytes as its state"
            raise ValueError(message)
    return states


class _Progress(Schema):
    model_config = ConfigDict(extra="forbid")

    n: Count
    calls: Count
    step: Moment
    averaged: Moment
    elapsed: Count
    mass: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    rate: Annotated[float, Field(ge=-1, le=1)]


class _Options(Schema):
    start: Count = 0
    every: Annotated[int, Field(ge=1, le=LARGEST)] = 1
    origin: Literal["initial", "first"] | None = None
    buffers: str | Mapping[str, str] = "auto"


class SavedState(Schema):
    """The state of one averager; whether its tensors fit a model is for the averager to see."""

    n: Count
    step: Moment | None = None
    strategy: Settings
    variant: str = Field("", alias="class")
    config: Annotated[Settings, AfterValidator(_counted)] = Field(default_factory=dict)
    slots: Mapping[str, Mapping[str, Any]]
    progress: _Progress
    history: Annotated[Any, AfterValidator(_history)]
    skipped: Count
    generators: Annotated[Any, AfterValidator(_generators)]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> SavedState:
        """Validate the types, ranges, order and sums of a state.

        Raises:
            StateError: If it is no state, or is damaged, incomplete or of a newer polyak.
        """
        check_format(raw)
        strategy = raw.get("strategy")
        if not isinstance(strategy, Mapping) or type(strategy.get("name")) is not str:
            message = "the state names no strategy; expected what averager.state_dict() returned"
            raise StateError(message)
        state = checked(cls, upgraded(raw), "the state", "Load the one before it.")
        if problem := state.contradiction():
            message = f"the state is damaged or incomplete: {problem}. Load the one before it."
            raise StateError(message)
        return state

    def contradiction(self) -> str:
        """Return which two of its numbers cannot both be right; empty if there are none."""
        progress, runs = self.progress, self.history
        if not self.n == progress.n == (runs.last[-1] if runs.last else 0):
            return f"it counts {self.n} updates, its progress {progress.n}, and its history others"
        if progress.calls < self.n or (progress.averaged < 0) != (not self.n):
            return f"it counts {self.n} updates, the last at step {progress.averaged}, of {progress.calls} calls"
        if self.step is not None and self.step != progress.step:
            return f"it is of step {self.step}, and its progress of step {progress.step}"
        lengths = (b - a for a, b in pairwise([0, *runs.last]))
        if progress.elapsed != (steps := sum(map(mul, runs.strides, lengths))):
            return f"its updates stand for {progress.elapsed} steps, and those of its history for {steps}"
        if progress.rate != (last := runs.rates[-1] if runs.rates else -1.0):
            return f"its last rate is {progress.rate}, and that of its history {last}"
        return "" if "average" in self.slots else "its slots lack 'average'"


def _names(names: Iterable[object]) -> str:
    return f"[{', '.join(map(shown, sorted(map(str, names))[:_SHOWN]))}]"


def _meant(raw: object) -> str:
    """Return advice for a checkpoint, weights or a path that was passed instead, or ""."""
    if isinstance(raw, (str, PathLike)):
        return ". A file is read by polyak.load(averager, path)"
    if not isinstance(raw, Mapping):
        return ""
    inner = [key for key, value in raw.items() if isinstance(value, Mapping) and "format" in value]
    if inner:
        return f". Pass checkpoint[{shown(inner[0])}]"
    weights = bool(raw) and all(isinstance(value, Tensor) for value in raw.values())
    return ". These are weights: model.load_state_dict() loads them" * weights


def check_format(raw: Any) -> None:  # noqa: ANN401 - a user's own object
    """Refuse what is no state of one averager, or of a newer polyak.

    Raises:
        StateError: If it is.
    """
    version = raw.get("format") if isinstance(raw, Mapping) else None
    if type(version) is int and isinstance(raw.get("bank"), Mapping):
        message = (
            f"the state is that of a bank of {_names(raw['bank'])}; load it into such a bank, "
            "or one of them: averager.load_state_dict(state['bank'][name])"
        )
        raise StateError(message)
    if type(version) is not int or version < 1:
        got = f"a mapping with the keys {_names(raw)}" if isinstance(raw, Mapping) else type(raw).__name__
        message = f"expected what averager.state_dict() returned (a mapping with 'format': {FORMAT}); got {got}"
        message += _meant(raw)
        raise StateError(message)
    if version > FORMAT:
        message = (
            f"the state has format {shown(version)}, and this polyak reads up to {FORMAT}; upgrade polyak to load it"
        )
        raise StateError(message)


def check_bank(raw: Any, names: Iterable[str]) -> Mapping[str, Any]:  # noqa: ANN401 - a user's own object
    """Return the states of a bank of these names.

    Raises:
        StateError: If it is no state of a bank, of one of other names, or of a newer polyak.
    """
    states = raw.get("bank") if isinstance(raw, Mapping) else None
    if not isinstance(states, Mapping):
        message = "expected what bank.state_dict() returned, a mapping with the key 'bank'"
        if isinstance(raw, Mapping) and "slots" in raw:
            message += "; this is one averager's: bank[name].load_state_dict(state)"
        message += _meant(raw)
        raise StateError(message)
    if "format" in raw:
        check_format({"format": raw["format"]})
    if {*states} != {*names}:
        message = f"the state is that of a bank of {_names(states)}, and this one has {_names(names)}"
        raise StateError(message)
    return states
