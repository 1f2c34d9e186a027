"""ignite's ``EMAHandler`` over polyak's engine."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from polyak.compat.following import followed
from polyak.errors import ConfigError, ModelError
from polyak.errors.calls import warn_user
from polyak.errors.extras import require
from polyak.errors.formatting import shown, type_name

require("polyak.compat.ignite", "pytorch-ignite", "0.5", "ignite")

from ignite.engine import Events  # noqa: E402 - not before it is known to be there
from ignite.handlers.state_param_scheduler import LambdaStateScheduler  # noqa: E402 - as above

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["EMAHandler"]

_BUFFERS = {"copy": "copy", "update": "auto", "ema_train": "skip"}


class EMAHandler:
    """ignite's ``EMAHandler``: a copy of a model that is the moving average of its weights.

    ``average += momentum * (weights - average)`` at each event; the momentum is read from the engine's state.

    Args:
        model: The model; of a ``DistributedDataParallel`` its module.
        momentum: The momentum after the warm-up, between 0 and 1.
        momentum_warmup: The momentum at the beginning.
        warmup_iters: Over how many events it changes.
        handle_buffers: "copy"; "update" averages them; "ema_train" leaves them to the average in train mode.

    Attributes:
        ema_model: The average.
        model: The model.
        momentum: The momentum.

    Raises:
        ConfigError: If the momentum or ``handle_buffers`` is wrong; a ``ValueError``, too.
        ModelError: If the model is no module; a ``ValueError``, too.

    Matches: pytorch-ignite 0.5.5 to rounding. Differs: NaN is held; copied buffers are copies and no aliases of the
    model's; a warm-up writes the momentum under the name that it was attached with.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: str = "copy",
    ) -> None:
        if not 0 < momentum < 1:
            message = f"Invalid momentum: {momentum}"
            raise ConfigError(message)
        if not isinstance(model, nn.Module):
            message = f"model should be an instance of nn.Module or its subclasses; got {type_name(model)}"
            raise ModelError(message)
        if handle_buffers not in _BUFFERS:
            message = f"handle_buffers can only be one of 'copy', 'update', 'ema_train'; got {shown(handle_buffers)}"
            raise ConfigError(message)
        self.momentum, self.handle_buffers = momentum, handle_buffers
        self.momentum_scheduler: Any
        self._momentum_lambda_obj: _WarmUp | None = None
        if momentum_warmup is not None and warmup_iters is not None:  # else ignite's has no scheduler at all
            self.momentum_scheduler = None
            self._momentum_lambda_obj = _WarmUp(momentum_warmup, warmup_iters, momentum)
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.ema_model = copy.deepcopy(self.model)
        for parameter in self.ema_model.parameters():
            parameter.detach_()
        self.ema_model.train(handle_buffers == "ema_train")
        self._averager = followed(self.model, self.ema_model, buffers=_BUFFERS[handle_buffers])

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,  # noqa: FBT001, FBT002 - ignite's signature
        event: Any = Events.ITERATION_COMPLETED,  # noqa: ANN401 - whatever is an event
    ) -> None:
        """Move the average at each event of an engine, whose state has the momentum under a name.

        Args:
            engine: The engine.
            name: The name.
            warn_if_exists: Whether to warn where the state has it already.
            event: The event.
        """
        if not hasattr(engine.state, name):
            setattr(engine.state, name, self.momentum)
        elif warn_if_exists:
            warn_user(
                f"Attribute '{name}' already exists in Engine.state: it was resumed, or another handler has the name; "
                "warn_if_exists=False silences this",
                UserWarning,
            )
        if self._momentum_lambda_obj is not None:
            self.momentum_scheduler = LambdaStateScheduler(self._momentum_lambda_obj, param_name=name)
            self.momentum_scheduler.attach(engine, event)  # before the average moves by it
        engine.add_event_handler(event, self._update_ema_model, name)

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        self._averager.update(self.model, rate=getattr(engine.state, name))


class _WarmUp:
    """A momentum that changes linearly, then stays."""

    def __init__(self, first: float, steps: int, last: float) -> None:
        self._first, self._steps, self._last = first, steps, last

    def __call__(self, event_index: int) -> float:
        now = self._first + (self._last - self._first) * (event_index - 1) / max(1, self._steps - 1)
        return min(self._last, now) if self._last >= self._first else max(self._last, now)
