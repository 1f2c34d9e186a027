"""The callback that averages what Lightning's Trainer trains."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - LightningCLI reads the types of arguments
from pathlib import Path  # noqa: TC003 - as above
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from polyak.config import AveragerConfig  # noqa: TC001 - as above
from polyak.errors import ConfigError
from polyak.errors.calls import warn_user
from polyak.errors.formatting import shown
from polyak.integrations.lightning import checkpoints
from polyak.integrations.lightning.evaluation import Evaluation
from polyak.integrations.lightning.foreign import continued, updates_of
from polyak.integrations.lightning.questions import is_fitting, logs_now, refuse_others
from polyak.integrations.lightning.steps import Steps
from polyak.integrations.metrics import logged
from polyak.integrations.settings import chosen
from polyak.integrations.weights import copied
from polyak.strategy.base import Strategy  # noqa: TC001 - as above
from polyak.tensors.wrappers import root_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from polyak.engine import Engine
    from polyak.engine.averager import Averager

__all__ = ["AveragingCallback"]

_ENDS = ("average", "raw")


class AveragingCallback(Callback):
    """Average the weights that a Trainer trains.

    Validation during ``fit``, the sanity check included, computes with the average, so early stopping, schedulers on
    plateau and the choice of the best checkpoint follow it. ``state_dict`` in a checkpoint is the average and loads
    anywhere, without polyak; the raw weights stand under Lightning's own key ``current_model_state``, from which a
    resumed ``fit`` goes on exactly. Training itself is bit-equal to training without the callback. Each ``fit`` begins
    a new average.

    Args:
        strategy: What ``polyak.average`` takes, or a config file (a path, or a name that ends in ``.toml``, ``.yaml``,
            ``.yml`` or ``.json``).
        name: A name in checkpoints, where several callbacks average. Give each its own.
        evaluate: Whether validation sees this average and checkpoints hold it as the model's weights. One callback of
            a trainer does; the others keep their averages in their own states.
        at_end: What the module holds after ``fit``: "average", so that ``trainer.test`` sees it, or "raw". Without
            ``evaluate`` it is always the raw weights.
        log: Whether ``polyak/rate``, ``polyak/distance`` (of weights and average), ``polyak/half_life``, ``polyak/n``,
            ``polyak/skipped`` and ``polyak/held`` are logged, every ``log_every_n_steps``; behind ``<name>/`` with a
            name.
        **options: Options of ``polyak.average``, and the strategy's settings.

    Attributes:
        averager: The averager of the last ``fit``. None before the first.

    Raises:
        UnknownStrategyError: If no strategy has that name.
        ConfigError: If a setting is wrong. When ``fit`` begins: two callbacks evaluate, or this one has averaged
            another model.

    Often confused with: Lightning's ``WeightAveraging`` and ``EMAWeightAveraging``, whose checkpoints it resumes.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from polyak.integrations.lightning import AveragingCallback
        >>> averaging = AveragingCallback("ema", decay=0.999)
        >>> trainer = Trainer(callbacks=[averaging], accelerator="cpu", logger=False, enable_progress_bar=False)
    """

    averager: Averager | None

    def __init__(
        self,
        strategy: str | Path | Mapping[str, Any] | Strategy | AveragerConfig = "ema",
        *,
        name: str | None = None,
        evaluate: bool = True,
        at_end: Literal["average", "raw"] = "average",
        log: bool = False,
        **options: Any,
    ) -> None:
        if at_end not in _ENDS:
            message = f"at_end={shown(at_end)} is unknown; expected 'average' or 'raw'"
            raise ConfigError(message)
        self._config = chosen(strategy, options, "AveragingCallback()")
        self.name, self.evaluate, self.at_end = name, evaluate, at_end
        self._logs = log  # Lightning puts a method of that name on callbacks
        self.averager = None
        self._steps: Steps | None = None
        self._evaluation: Evaluation | None = None
        self._loaded: dict[str, Any] | None = None
        self._foreign: tuple[dict[str, Any], int] | None = None
        self._resumed = self._restored = self._in_model = False

    @property
    @override
    def state_key(self) -> str:
        if self.name is not None:
            return str(self._generate_state_key(name=self.name))
        return type(self).__qualname__ if self.evaluate else str(self._generate_state_key(evaluate=False))

    # The life of an average

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.averager is not None and cast("Engine", self.averager).model is not root_of(pl_module):
            other = f"this AveragingCallback has averaged another {type(pl_module).__name__}"
            message = f"{other}; make a new callback for each model"
            raise ConfigError(message)
        if self.evaluate:
            refuse_others(self, trainer.callbacks)
        self._stop()
        self.averager = self._evaluation = self._loaded = self._foreign = None
        self._resumed = self._restored = self._in_model = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: configure_model() has made all layers now, and the strategy its optimisers and shards.
        self.averager = averager = self._config.build(pl_module)
        self._take(pl_module)
        self._steps = Steps(averager, trainer.optimizers)
        self._evaluation = Evaluation(averager)
        if self.evaluate:
            checkpoints.save_average(trainer.strategy, averager, self._is_ready)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Begin anew where a checkpoint without an average was loaded, perhaps behind on_fit_start.
        if self.averager is None or self._restored or not trainer.ckpt_path:
            return
        if not self._resumed:  # it holds weights alone, of which callbacks are not told
            self._take_foreign({})
        self.averager.load_state_dict(self._config.build(pl_module).state_dict())
        self._restored = True

    on_sanity_check_start = on_train_start  # whichever comes first

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is None or self.averager is None:
            return
        self._steps.batch_ends()
        if self._logs and self.averager.n and logs_now(trainer):
            prefix = "" if self.name is None else f"{self.name}/"
            pl_module.log_dict({f"{prefix}{key}": value for key, value in logged(self.averager).items()})

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: the last checkpoints are written when training ends, and need the raw weights.
        self._stop()
        if self.at_end == "average" and self.averager is not None and self._is_ready():
            self.averager.copy_to()
            self._in_model = True
            checkpoints.save_module(trainer.strategy)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Nothing else is called after an error in a validation. Checkpoints may still be written.
        self._stop()

    # Evaluating

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps and self._evaluation and self._is_ready():
            self._evaluation.enter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluation:
            self._evaluation.leave()

    def _is_ready(self) -> bool:
        """Return whether there is an average to evaluate that the module does not hold for good already."""
        return self.evaluate and self.averager is not None and self.averager.n > 0 and not self._in_model

    def _stop(self) -> None:
        if self._evaluation is not None:
            self._evaluation.leave()
        if self._steps is not None:
            self._steps.remove()
            self._steps = None

    # Saving

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"averaged": False} if self.averager is None else self.averager.state_dict(full=True)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._evaluation is None or self._in_model:
            return
        with self._evaluation.raw():
            if self._is_ready():
                checkpoints.add_raw(checkpoint, trainer.strategy, self.state_key)

    # Resuming: before on_fit_start, or behind it where the strategy restores after its setup

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = is_fitting(trainer)
        if not self._resumed:
            return
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            self._take_foreign(checkpoint)
        checkpoints.load_raw(checkpoint, pl_module)
        self._take(pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._resumed or state_dict.get("averaged") is False:
            return  # test() and predict() load checkpoints, too, and a search for a learning rate before the fit
        self._loaded = state_dict
        self._take()

    def _take_foreign(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the average of Lightning's own callbacks, or warn that there is none."""
        updates = updates_of(checkpoint)
        if self.evaluate and updates:
            self._foreign = copied(checkpoint["state_dict"]), updates
            own = f"an average of Lightning's own ({updates} updates)"
            message = f"the checkpoint holds {own}; it goes on by {self._config.strategy!r}"
        else:
            message = "the checkpoint holds no average; the average begins anew from its weights"
        warn_user(message)

    def _take(self, pl_module: LightningModule | None = None) -> None:
        """Give the averager, once there is one, what a checkpoint held."""
        if self.averager is None:
            return
        if self._foreign is not None and pl_module is not None:
            average, updates = self._foreign
            self._loaded = continued(self.averager, self._config, pl_module, average, updates)
        if self._loaded is not None:
            self.averager.load_state_dict(self._loaded)
            self._restored = True
        self._foreign = self._loaded = None
