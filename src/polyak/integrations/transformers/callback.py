"""The average of one trainer: built when training begins, updated by its optimiser, kept by the model at the end."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback
from typing_extensions import override

from polyak.config import AveragerConfig
from polyak.errors import ConfigError
from polyak.errors.calls import warn_user
from polyak.errors.formatting import shown
from polyak.integrations import folder
from polyak.integrations.metrics import logged
from polyak.integrations.weights import is_sharded, raw_weights, restore
from polyak.optim.attach import attach
from polyak.tensors.entries import walk
from polyak.tensors.wrappers import root_of

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager

    from torch import nn
    from transformers import Trainer

    from polyak.engine.averager import Averager
    from polyak.optim.attach import Attachment

__all__ = ["AveragingCallback"]

_FOLDER = "polyak"
_CHECKPOINTS = ("average", "raw")


class AveragingCallback(TrainerCallback):
    """What ``average_trainer`` returns: it holds the averager of one trainer.

    Args:
        trainer: The trainer, whose class has the ``AveragingMixin``.
        config: The average.
        checkpoint: Which weights ``model.safetensors`` of a checkpoint holds, "average" or "raw".
        log: Whether the trainer's own logs get numbers of the average.

    Attributes:
        averager: The averager of the last training. None before the first.
    """

    averager: Averager | None

    def __init__(
        self, trainer: Trainer, config: AveragerConfig, *, checkpoint: Literal["average", "raw"], log: bool
    ) -> None:
        if checkpoint not in _CHECKPOINTS:
            message = f"checkpoint={shown(checkpoint)} is unknown; expected 'average' or 'raw'"
            raise ConfigError(message)
        self.averager = None
        self.checkpoint, self.log = checkpoint, log
        self._trainer, self._config = trainer, config
        self._attachment: Attachment | None = None
        self._resumes: Path | None = None
        self._in_model = False
        self.check()

    # What the trainer's methods ask for

    def check(self) -> None:
        """Refuse settings of the trainer by which the average would be lost.

        Raises:
            ConfigError: If the best model is to be loaded, and nothing chooses or holds it.
        """
        args = self._trainer.args
        if not args.load_best_model_at_end:
            return
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            message = (
                "load_best_model_at_end=True chooses by evaluations, and the trainer makes none; set eval_strategy and "
                "eval_dataset, or leave it out: the model holds the last average then"
            )
            raise ConfigError(message)
        if self.checkpoint == "raw" and args.save_only_model:
            message = (
                "load_best_model_at_end=True loads the average from the best checkpoint, which holds none with "
                "checkpoint='raw' and save_only_model=True; change one of them"
            )
            raise ConfigError(message)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes with the average, where there is one already."""
        if self.averager is None or self._in_model or not self.averager.n:
            return nullcontext()
        return self.averager.applied()

    def saved(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds what its file in a checkpoint shall hold."""
        return self.averaged() if self.checkpoint == "average" else nullcontext()

    def resume(self, checkpoint: str | os.PathLike[str]) -> None:
        """Take the average from a checkpoint once training begins."""
        self._resumes = Path(checkpoint)

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write what an exact resume needs into the folder of a checkpoint; all ranks call it."""
        if self.averager is None:
            return
        place, writes = Path(checkpoint) / _FOLDER, bool(self._trainer.args.should_save)
        folder.save_average(self.averager, place / "averager", writes=writes)
        # Sharded weights are in the files that the trainer itself resumes from.
        if writes and self.checkpoint == "average" and not (self._in_model or is_sharded(self.averager)):
            folder.save_weights(raw_weights(self.averager), place / "weights")

    def metrics(self) -> dict[str, float]:
        """Return what the trainer logs together with its loss."""
        if not self.log or self.averager is None or self._in_model:
            return {}
        return logged(self.averager)

    def take_best(self) -> None:
        """Keep the best model, which the trainer has loaded; load its average where its file holds raw weights."""
        if self.averager is None:
            return
        if self.checkpoint == "raw" or is_sharded(self.averager):
            best = self._build()
            folder.load_average(best, Path(self._trainer.state.best_model_checkpoint) / _FOLDER / "averager")
            best.copy_to()
        self._in_model = True

    def stop(self) -> None:
        """Take the hooks off the optimiser."""
        self._resumes = None
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    # Events

    @override
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        message = (
            "this AveragingCallback belongs to another trainer; it is no argument of a Trainer. Call "
            "polyak.integrations.transformers.average_trainer(trainer, ...) for each trainer"
        )
        raise ConfigError(message)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state is not self._trainer.state:
            self.on_init_end(args, state, control)
        resumes = self._resumes
        self.stop()
        self._in_model = False
        averager = self._build()
        if resumes is not None:
            _load(averager, resumes)
        # By its hooks: a step that the scaler skips counts in the trainer's global_step, and is none.
        self._attachment = attach(self._trainer.optimizer, averager)
        self.averager = averager

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()
        if self.averager is not None and self.averager.n and not self._in_model:
            self.averager.copy_to()
            self._in_model = True

    def _build(self) -> Averager:
        model, config = self._trainer.model, self._config
        if _has_adapters(model) and config.include is None:
            trained = [entry.name for entry in walk(model) if entry.tensor.requires_grad]
            config = AveragerConfig.of({**config.named(), "include": trained})
        return config.build(model)


def _load(averager: Averager, checkpoint: Path) -> None:
    place = checkpoint / _FOLDER
    if not folder.holds(place / "averager"):
        message = f"{str(checkpoint)!r} holds no average; the average begins anew from its weights"
        warn_user(message)
        return
    if folder.holds(place / "weights"):
        restore(averager, folder.load_weights(place / "weights"))
    folder.load_average(averager, place / "averager")


def _has_adapters(model: nn.Module) -> bool:
    """Return whether only adapters of a model are saved (PEFT)."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(root_of(model)).__mro__)
