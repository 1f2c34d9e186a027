"""What one run of the benchmark is asked for; wrong names are refused before anything is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, get_args

import torch

import polyak
from polyak.bench.libraries import LIBRARIES
from polyak.bench.models import MODELS
from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.kernels.select import KernelName
from polyak.strategy.numbers import as_integer, as_number, given_integer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

__all__ = ["Settings", "checked", "kernel_names"]

_RANKS = (1, 2, 4)
_THREADS = 4096  # more end the process
_CROWD = 8  # ranks that may share a core: each is a process that imports torch


@dataclass(frozen=True)
class Settings:
    """What is measured, on what, and for how long.

    Attributes:
        models: Names of ``MODELS``, or ``"module:callable"``.
        strategies: Names of strategies; ("all",) for each that can be made with its defaults.
        kernels: Names of kernels; empty: all for the first strategy, "auto" for the others.
        against: Names of ``LIBRARIES``. Defaults to all that are installed.
        device: Where the models live. Defaults to the accelerator, else the CPU.
        threads: How many threads torch computes with. Defaults to torch's choice; an update on a CPU is
            then also measured with one.
        seconds: How long one case measures one model, about.
        ranks: On how many ranks, one number after the other; empty: 1, 2 and 4, as far as there is room.
    """

    models: tuple[str, ...] = ("resnet50",)
    strategies: tuple[str, ...] = ("ema",)
    kernels: tuple[str, ...] = ()
    against: tuple[str, ...] | None = None
    device: str | None = None
    threads: int | None = None
    seconds: float = 15.0
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.models:
            if ":" not in name:
                checked("model", name, MODELS, "or module:callable")
        for name in self.kernels:
            checked("kernel", name, kernel_names())
        for name in self.against or ():
            checked("library", name, LIBRARIES)
        for name in self.strategies:
            if name != "all":
                checked("strategy", name, polyak.strategies(), "or all")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if (seconds := as_number(self.seconds)) is None or seconds < 0:
            message = f"seconds: got {shown(self.seconds)}; expected a finite number from 0 on"
            raise ConfigError(message)
        if self.threads is not None:
            given_integer("threads", self.threads, 1, _THREADS)
        # Several ranks may share cores, but not an accelerator.
        crowd, where = (_CROWD, f"{_CROWD} for each core") if self.place.type == "cpu" else (1, "one for each device")
        for count in self.ranks:
            if (ranks := as_integer(count)) is None or not 1 <= ranks <= crowd * self.room:
                message = f"ranks: got {shown(count)}; expected 1 to {crowd * self.room} here, {where}"
                raise ConfigError(message)

    @property
    def place(self) -> torch.device:
        """The device, as torch knows it."""
        if self.device is None:
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            return found or torch.device("cpu")
        try:
            return torch.empty(1, device=self.device).device
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            message = f"the device {self.device!r} cannot be used here ({reason}); give another, such as cpu"
            raise ConfigError(message) from error

    @property
    def room(self) -> int:
        """How many ranks have a core or an accelerator of their own."""
        if self.place.type != "cpu":
            return torch.accelerator.device_count()
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def chosen_threads(self, case: str) -> list[int]:
        """Return how many threads torch computes with, one number after the other."""
        if self.threads is not None:
            return [self.threads]
        own = torch.get_num_threads()
        return [1, own] if case == "update" and self.place.type == "cpu" and own > 1 else [own]

    def chosen_ranks(self) -> list[int]:
        """Return on how many ranks, the smallest number first."""
        return sorted({*self.ranks}) or [count for count in _RANKS if count <= self.room]

    def lasting(self, seconds: float) -> Settings:
        """Return the same for another time."""
        return replace(self, seconds=seconds)

    def chosen_strategies(self) -> list[str]:
        """Return the names of all strategies that take part."""
        known = polyak.strategies()
        if "all" not in self.strategies:
            return list(self.strategies)
        complete = [name for name in known if not any(f.is_required() for f in known[name].model_fields.values())]
        return ["ema", *(name for name in complete if name != "ema")]

    def chosen_kernels(self, strategy: str) -> Sequence[str]:
        """Return the kernels with which a strategy takes part."""
        if self.kernels:
            return self.kernels
        return kernel_names() if strategy == self.chosen_strategies()[0] else ("auto",)


def kernel_names() -> tuple[str, ...]:
    """Return the names of all kernels, whether or not they run here."""
    return get_args(KernelName)


def checked(what: str, name: str, known: Iterable[str], also: str = "") -> str:
    """Return ``name`` where it is known, else raise with the nearest one.

    Raises:
        ConfigError: If the name is unknown.
    """
    names: Collection[str] = list(known)
    if name in names:
        return name
    near = get_close_matches(name.lower(), names, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(filter(None, [*names, also]))
    message = f"no {what} is called {name!r}.{hint} Known: {listed}."
    raise ConfigError(message)
