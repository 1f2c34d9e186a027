"""The cadence: which calls of ``update`` become averaged updates, and how many steps each stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.strategy.clock import Clock
from polyak.strategy.numbers import LARGEST, as_integer, as_number

if TYPE_CHECKING:
    from polyak.strategy.base import Strategy

__all__ = ["Progress", "Tick", "given_lr", "given_rate", "given_step", "tick"]


class Progress(NamedTuple):
    """How far an averager is; everything a resumed run needs beside the tensors.

    Attributes:
        n: Averaged updates so far.
        calls: Calls of ``update`` so far.
        step: The step of the last call; -1 before the first.
        averaged: The step of the last averaged update; -1 before the first.
        elapsed: Steps averaged so far: the sum of all strides.
        mass: The sum of the strategy's weights so far.
        rate: The rate of the last averaged update; -1 before the first.
    """

    n: int = 0
    calls: int = 0
    step: int = -1
    averaged: int = -1
    elapsed: int = 0
    mass: float = 0.0
    rate: float = -1.0

    def seen(self, now: Tick) -> Progress:
        """Return the progress after a call that averaged nothing."""
        return self._replace(calls=self.calls + 1, step=now.step)

    def averaged_at(self, clock: Clock, rate: float, weight: float) -> Progress:
        """Return the progress after a call that was an averaged update."""
        step = clock.step
        return Progress(clock.n, self.calls + 1, step, step, clock.elapsed, self.mass + weight, rate)

    def clock(self, now: Tick, lr: float | None) -> Clock:
        """Return the moment of an averaged update, as a strategy sees it.

        Raises:
            ConfigError: If the steps averaged so far are more than the history can hold.
        """
        elapsed = self.elapsed + now.stride
        if elapsed > LARGEST:
            message = f"step: {now.step} makes {elapsed} averaged steps in all; expected at most {LARGEST}"
            raise ConfigError(message)
        return Clock(self.n + 1, now.step, now.stride, lr, self.mass, elapsed, now.counted)


class Tick(NamedTuple):
    """What one call of ``update`` amounts to."""

    step: int
    stride: int
    due: bool
    counted: bool
    order: Literal["forward", "repeated", "backward"]

    def complaint(self, last: Progress) -> str:
        """Return a complaint about a step that is probably not meant, or ""."""
        if self.order == "repeated":
            return f"update() twice at step {self.step}; the second is left out. Call it once per optimiser step."
        if self.order == "backward":
            return (
                f"update(step={self.step}) after step {last.step}: the step went back; it must count over the whole "
                "run, not per epoch. Or was a checkpoint of the model loaded without the averager's state?"
            )
        return ""


def given_step(step: object) -> int:
    """Return a given step as a plain integer; one of numpy or torch would not load with ``weights_only=True``.

    Raises:
        ConfigError: If ``step`` is no integer, negative, or larger than the history can hold.
    """
    number = as_integer(step)
    if number is None or not 0 <= number <= LARGEST:
        message = (
            f"step: got {shown(step)}; expected the count of optimiser steps so far, an integer from 0 to {LARGEST}"
        )
        raise ConfigError(message)
    return number


def given_lr(lr: object) -> float:
    """Return a given learning rate as a plain float.

    Raises:
        ConfigError: If ``lr`` is no finite number.
    """
    number = as_number(lr)
    if number is None:
        message = f"lr: got {shown(lr)}; expected the learning rate of this step, a finite number"
        raise ConfigError(message)
    return number


def given_rate(rate: object, strategy: Strategy) -> float:
    """Return a rate that was given in place of a strategy's as a plain float.

    Raises:
        ConfigError: If ``rate`` is no number from 0 to 1, or the strategy keeps several tensors.
    """
    number = as_number(rate)
    if number is None or not 0.0 <= number <= 1.0:
        message = f"rate: got {shown(rate)}; expected a number from 0 (the average stays) to 1 (it is replaced)"
        raise ConfigError(message)
    if strategy.slots():
        message = f"rate: the strategy {strategy.name!r} moves several tensors by rates of its own; leave rate= out"
        raise ConfigError(message)
    return number


def tick(last: Progress, step: int | None, *, start: int, every: int) -> Tick:
    """Return the meaning of a call, given the progress before it.

    A call is due when its step is at least ``start`` and a multiple of ``every`` was reached since the previous call,
    so that steps that jump are not missed. The same step twice is the same weights: it is not due.

    Args:
        last: The progress before this call.
        step: The step given by the caller. Defaults to the one after the last.
        start: The first step that may be averaged.
        every: Average one step in so many.

    Raises:
        ConfigError: If ``step`` is no step, or the counted one is larger than the history can hold.
    """
    first, counted = last.calls == 0, step is None
    step = given_step(step if step is not None else 1 if first else last.step + 1)
    previous = min(0, step - 1) if first else last.step
    if step == previous:
        return Tick(step, 0, due=False, counted=counted, order="repeated")
    backward = step < previous
    if backward:
        previous = step - 1
    fresh = last.n == 0 or backward or step <= last.averaged
    stride = every if fresh else step - last.averaged
    due = step >= start and step // every > previous // every
    return Tick(step, stride, due, counted, "backward" if backward else "forward")
