"""What is asked of a trainer: who else evaluates an average, whether it fits, and whether it logs now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

__all__ = ["is_fitting", "logs_now", "refuse_others"]

_OWN = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")


def refuse_others(own: Callback, callbacks: Iterable[Callback]) -> None:
    """Refuse a second callback that puts an average into the model for validation.

    Raises:
        ConfigError: If there is one.
    """
    for other in callbacks:
        both = isinstance(other, type(own)) and other.evaluate and other is not own
        if both or any(base.__name__ in _OWN for base in type(other).__mro__):
            message = (
                f"{type(other).__name__} and {type(own).__name__} would both put an average into the model for "
                f"validation; keep one, or give {type(own).__name__}(..., evaluate=False)"
            )
            raise ConfigError(message)


def is_fitting(trainer: Trainer) -> bool:
    """Return whether a checkpoint is loaded to be trained on."""
    return str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit"


def logs_now(trainer: Trainer) -> bool:
    """Return whether the trainer gives its loggers what this batch logs: the numbers cost a pass over the weights."""
    connector = trainer._logger_connector  # noqa: SLF001 - Lightning tells it in no public way
    return bool(trainer.loggers) and bool(getattr(connector, "should_update_logs", True))
