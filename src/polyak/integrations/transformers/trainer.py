"""The Trainer with an average: ``average_trainer`` for a trainer that exists, ``AveragingMixin`` for classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from transformers import Trainer
from typing_extensions import override

from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import shown
from polyak.integrations.settings import chosen
from polyak.integrations.transformers.callback import AveragingCallback

if TYPE_CHECKING:
    import os

    from polyak.config import AveragerConfig
    from polyak.config.chosen import AnyStrategy

    class _Base(Trainer):
        """What the methods of the mixin find behind it."""

else:
    _Base = object

__all__ = ["AveragingMixin", "average_trainer"]


class AveragingMixin(_Base):
    """Methods of a Trainer that evaluate and save its average; write it before the class of the trainer.

    Args:
        *args: The trainer's own arguments.
        average: The average: what ``polyak.average`` takes as a strategy, a config or its file. Defaults to none.
        checkpoint: As in ``average_trainer``.
        log: As in ``average_trainer``.
        **kwargs: The trainer's own arguments.

    Attributes:
        averaging: The callback that holds the averager. None without an average.

    Examples:
        >>> from polyak.integrations.transformers import AveragingMixin
        >>> from transformers import Seq2SeqTrainer
        >>> class AveragedSeq2SeqTrainer(AveragingMixin, Seq2SeqTrainer):
        ...     pass
    """

    averaging: AveragingCallback | None = None

    def __init__(
        self,
        *args: Any,
        average: AnyStrategy | AveragerConfig | os.PathLike[str] | None = None,
        checkpoint: Literal["average", "raw"] = "average",
        log: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if average is not None:
            average_trainer(self, average, checkpoint=checkpoint, log=log)

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.averaging is None:
            return super().train(*args, **kwargs)
        self.averaging.check()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.averaging.stop()

    @override
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.averaging is None:
            return super().evaluation_loop(*args, **kwargs)
        with self.averaging.averaged():
            return super().evaluation_loop(*args, **kwargs)

    if hasattr(Trainer, "prediction_loop"):  # before transformers 5

        @override
        def prediction_loop(self, *args: Any, **kwargs: Any) -> Any:
            if self.averaging is None:
                return super().prediction_loop(*args, **kwargs)
            with self.averaging.averaged():
                return super().prediction_loop(*args, **kwargs)

    @override
    def save_model(self, *args: Any, **kwargs: Any) -> None:
        if self.averaging is None:
            super().save_model(*args, **kwargs)
            return
        with self.averaging.saved():
            super().save_model(*args, **kwargs)

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.averaging is not None and "loss" in logs:  # not those of evaluations, nor the summary at the end
            logs = {**logs, **self.averaging.metrics()}
        super().log(logs, *args, **kwargs)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.averaging is not None:
            self.averaging.save(output_dir)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.averaging is not None and checkpoint is not None:
            self.averaging.resume(checkpoint)

    @override
    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.averaging is not None:
            self.averaging.take_best()


def average_trainer(
    trainer: Trainer,
    strategy: AnyStrategy | AveragerConfig | os.PathLike[str] = "ema",
    *,
    checkpoint: Literal["average", "raw"] = "average",
    log: bool = True,
    **options: Any,
) -> AveragingCallback:
    """Average the weights that a Trainer trains; call it before ``train()``.

    Every evaluation and prediction during training sees the average, and so do early stopping, schedulers on plateau
    and the choice of the best checkpoint. ``model.safetensors`` of a checkpoint is the average, and its folder
    ``polyak`` holds the averager and the raw weights, from which ``resume_from_checkpoint`` goes on exactly. After
    ``train()`` the model holds the average: the best one under ``load_best_model_at_end``, else the last. So
    ``save_model()`` and ``push_to_hub()`` publish it. Each ``train()`` begins a new average. Training itself is
    bit-equal to training without it. Of PEFT models the adapters are averaged.

    The trainer's class becomes one with the ``AveragingMixin``, in place.

    Args:
        trainer: The trainer, or one of a class of yours.
        strategy: What ``polyak.average`` takes, or a config file (a path, or a name that ends in ``.toml``, ``.yaml``,
            ``.yml`` or ``.json``).
        checkpoint: Which weights a checkpoint's model file holds. With "raw", the average is in the folder ``polyak``
            alone; evaluations and the model after ``train()`` are the same.
        log: Whether the trainer's logs of the loss get ``polyak/rate``, ``polyak/distance`` (of weights and average),
            ``polyak/half_life``, ``polyak/n``, ``polyak/skipped`` and ``polyak/held``.
        **options: Options of ``polyak.average``, and the strategy's settings.

    Returns:
        The callback, whose ``averager`` is there from the beginning of ``train()``.

    Raises:
        UnknownStrategyError: If no strategy has that name.
        ConfigError: If a setting is wrong, the trainer averages already, or ``load_best_model_at_end`` has no
            evaluation to choose by.
        ArgumentError: If ``trainer`` is no Trainer.

    Often confused with: a ``TrainerCallback`` that swaps weights on events. There is no event before an evaluation.

    Examples:
        >>> import torch, transformers
        >>> from polyak.integrations.transformers import average_trainer
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         return {"loss": (super().forward(x) - labels).square().mean()}
        >>> rows = [{"x": torch.ones(2), "labels": torch.zeros(1)}] * 8
        >>> args = transformers.TrainingArguments(max_steps=3, save_strategy="no", report_to=[], disable_tqdm=True)
        >>> trainer = transformers.Trainer(Model(2, 1), args, train_dataset=rows)
        >>> averaging = average_trainer(trainer, "ema", decay=0.9)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> averaging.averager.n
        3
    """
    config = chosen(strategy, options, "average_trainer()")
    if not isinstance(trainer, Trainer):
        message = f"average_trainer() got {shown(trainer)}; expected a transformers.Trainer"
        raise ArgumentError(message)
    if getattr(trainer, "averaging", None) is not None:
        message = (
            "this trainer has an average already, and evaluations can see only one; call average_trainer() once, and "
            "attach others to the optimiser: polyak.attach(trainer.optimizer, averager)"
        )
        raise ConfigError(message)
    averaging = AveragingCallback(trainer, config, checkpoint=checkpoint, log=log)
    if not isinstance(trainer, AveragingMixin):
        own = type(trainer)
        trainer.__class__ = type(own.__name__, (AveragingMixin, own), {"__module__": own.__module__})
    trainer.averaging = averaging
    # First of all: the others see at the end what the model holds then.
    trainer.callback_handler.callbacks.insert(0, averaging)
    return averaging
