"""The average in engines of Ignite: updated by the trainer's optimiser, and in the model while evaluators run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from polyak.errors import AppliedError, ArgumentError, ConfigError
from polyak.errors.calls import warn_user
from polyak.errors.extras import require
from polyak.errors.formatting import shown
from polyak.integrations.metrics import logged
from polyak.integrations.settings import chosen
from polyak.optim.attach import attach
from polyak.tensors.wrappers import root_of

require("polyak.integrations.ignite", "pytorch-ignite", "0.5", "ignite")

from ignite.engine import Engine, Events  # noqa: E402 - not before it is known to be there

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from polyak import engine
    from polyak.config import AveragerConfig
    from polyak.config.chosen import AnyStrategy
    from polyak.engine.averager import Averager

__all__ = ["Averaged", "AveragingHandler"]


class AveragingHandler:
    """Average the weights that a trainer engine trains, and evaluate the average in evaluator engines.

    Args:
        model: The model, wrapped or not.
        strategy: What ``polyak.average`` takes, or a config file (a path, or a name that ends in ``.toml``, ``.yaml``,
            ``.yml`` or ``.json``).
        **options: Options of ``polyak.average``, and the strategy's settings.

    Attributes:
        averager: The averager.
        averaged: The averaged model for ``Checkpoint``: its ``state_dict()`` loads anywhere.

    Raises:
        UnknownStrategyError: If no strategy has that name.
        ConfigError: If a setting is wrong.
        ModelError: If the model has no tensors, or is on ``meta``.

    Often confused with: ``ignite.handlers.EMAHandler``, which has a copy of the model and updates it once per
    iteration, also where gradients are accumulated.

    Examples:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from polyak.integrations.ignite import AveragingHandler
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def step(engine, batch):
        ...     optimizer.zero_grad()
        ...     model(batch).sum().backward()
        ...     optimizer.step()
        >>> trainer, evaluator = Engine(step), Engine(lambda engine, batch: model(batch))
        >>> averaging = AveragingHandler(model, "ema", decay=0.9)
        >>> averaging.attach(trainer, optimizer)
        >>> averaging.attach_evaluator(evaluator)
        >>> _ = trainer.run(torch.ones(4, 1, 2))
        >>> averaging.averager.n
        4
    """

    def __init__(
        self, model: nn.Module, strategy: AnyStrategy | AveragerConfig | os.PathLike[str] = "ema", **options: Any
    ) -> None:
        self._config = chosen(strategy, options, "AveragingHandler()")
        self.averager: Averager = self._config.build(model)
        self.averaged = Averaged(self.averager)

    def attach(self, trainer: Engine, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Update the average after each real step of an optimiser, whatever is accumulated or skipped.

        Until the first update the average follows the model: weights that are loaded before the run are its start.

        Args:
            trainer: The engine that trains.
            optimizer: Its optimiser, or a list of those that train the model.

        Raises:
            ArgumentError: If the trainer is no engine.
            MismatchError: If the optimiser trains no tensor of the model.
            ConfigError: If they are attached already.
        """
        _refuse_other("attach", trainer, "a trainer")
        attach(optimizer, self.averager)
        trainer.add_event_handler(Events.STARTED, self._begin)

    def attach_evaluator(self, evaluator: Engine) -> None:
        """Let the model hold the average while an engine runs, handlers of all its events included.

        The raw weights are restored when ``run()`` returns: on completion, ``terminate()``, ``interrupt()``, an
        exception and Ctrl-C. Before the first update the engine sees the weights as they are.

        Args:
            evaluator: The engine that evaluates.

        Raises:
            ArgumentError: If it is no engine.
            ConfigError: If another handler puts its average into the model there.
        """
        _refuse_other("attach_evaluator", evaluator, "an evaluator")
        own = evaluator.run
        if hasattr(own, "averaging"):
            message = "this evaluator has an average already, and can see only one; make another evaluator for this one"
            raise ConfigError(message)

        @wraps(own)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._applied():
                return own(*args, **kwargs)

        # No event handlers: one on EXCEPTION_RAISED would hide exceptions from everyone else.
        run.averaging = self  # type: ignore[attr-defined]  # asked for above
        evaluator.run = run

    def metrics(self, *_: Any) -> dict[str, float]:
        """Return numbers of the average for a logger, at its own events: ``output_transform=averaging.metrics``.

        They are ``polyak/rate``, ``polyak/distance`` (of weights and average), ``polyak/half_life``, ``polyak/n``,
        ``polyak/skipped`` and ``polyak/held``.
        """
        return logged(self.averager)

    def state_dict(self) -> dict[str, Any]:
        """Return the averager's state, for ``Checkpoint``.

        Raises:
            AppliedError: If the model holds the average: the checkpoint would hold it as the model's weights.
        """
        if self.averager.is_applied:
            message = (
                "saving the averager while the model holds the average would save the average as the weights; attach "
                "the Checkpoint for resuming to the trainer. An evaluator's may hold the model or .averaged."
            )
            raise AppliedError(message)
        return self.averager.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the state was taken.

        Raises:
            StateError: If it belongs to another model or strategy, or is damaged.
        """
        self.averager.load_state_dict(state)

    def _applied(self) -> AbstractContextManager[None]:
        return self.averager.applied() if self.averager.n else nullcontext()

    def _begin(self, trainer: Engine) -> None:
        averager = cast("engine.Engine", self.averager)
        if averager.n or averager.progress.calls or averager.loads:
            return
        if trainer.state.iteration:
            message = (
                f"the trainer resumes at iteration {trainer.state.iteration}, and no average was loaded; it begins "
                "anew from the model's weights"
            )
            warn_user(message)
        averager.load_state_dict(self._config.build(cast("nn.Module", averager.model)).state_dict())


class Averaged:
    """The averaged model as an object that ``Checkpoint`` saves.

    Args:
        averager: The averager.
    """

    def __init__(self, averager: Averager) -> None:
        self._averager = averager

    def state_dict(self) -> dict[str, Any]:
        """Return the average with the names and dtypes of the model's own state dict."""
        return self._averager.averaged_state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load averaged weights into the model itself, as a program that only evaluates does."""
        root_of(cast("nn.Module", cast("engine.Engine", self._averager).model)).load_state_dict(state)


def _refuse_other(call: str, value: object, what: str) -> None:
    if not isinstance(value, Engine):
        message = f"{call}() got {shown(value)} as {what}; expected an ignite.engine.Engine"
        raise ArgumentError(message)
