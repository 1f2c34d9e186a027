"""The average in a loop of Accelerate: attached after ``prepare``, saved and loaded with its states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.engine.averager import refuse_other
from polyak.errors import AppliedError, ArgumentError, ConfigError
from polyak.errors.calls import warn_user
from polyak.errors.extras import require
from polyak.errors.formatting import shown
from polyak.integrations import folder as beside
from polyak.integrations.settings import chosen
from polyak.optim.attach import attach
from polyak.optim.stepping import unwrapped

require("polyak.integrations.accelerate", "accelerate", "1.10", "accelerate")

from accelerate import Accelerator  # noqa: E402 - not before it is known to be there
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402 - as above

if TYPE_CHECKING:
    import os

    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from polyak.config import AveragerConfig
    from polyak.config.chosen import AnyStrategy
    from polyak.engine.averager import Averager

__all__ = ["average", "save_average"]

_FOLDER = "polyak"


def average(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    strategy: AnyStrategy | AveragerConfig | os.PathLike[str] = "ema",
    **options: Any,
) -> Averager:
    """Average the weights of a prepared model; call it after ``accelerator.prepare``.

    The averager is updated by the optimiser's real steps, whatever is accumulated and whatever the scaler skips.
    ``accelerator.save_state`` writes it into the folder ``polyak`` of the checkpoint, and ``accelerator.load_state``
    goes on exactly from it. A checkpoint without an average loads with one warning; the average begins anew then.

    Args:
        accelerator: The accelerator that prepared the model and the optimiser.
        model: The prepared model.
        optimizer: The prepared optimiser, or a list of those that train the model.
        strategy: What ``polyak.average`` takes, or a config file (a path, or a name that ends in ``.toml``, ``.yaml``,
            ``.yml`` or ``.json``).
        **options: Options of ``polyak.average``, and the strategy's settings.

    Returns:
        The averager. Call it again for a second one; they are saved by their order.

    Raises:
        ArgumentError: If the arguments are in another order.
        ConfigError: If the optimiser is not prepared, or a setting is wrong.
        MismatchError: If the optimiser trains no tensor of the model.
        ModelError: If the model has no tensors, or is on ``meta``.

    ``save_state`` raises an ``AppliedError`` inside ``applied()``, where the model holds the average.

    Often confused with: ``accelerator.register_for_checkpointing(averager)``, which saves by position: a checkpoint
    with another number of objects does not load.

    Examples:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from polyak.integrations.accelerate import average
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Linear(2, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> averager = average(accelerator, model, optimizer, "ema", decay=0.9)
        >>> accelerator.backward(model(torch.ones(1, 2)).sum())
        >>> optimizer.step()
        >>> averager.n
        1
    """
    config = chosen(strategy, options, "average()")
    if not isinstance(accelerator, Accelerator):
        message = (
            f"average() got {shown(accelerator)} as the accelerator; expected average(accelerator, model, optimizer)"
        )
        raise ArgumentError(message)
    optimizers = [*optimizer] if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers or not all(isinstance(one, AcceleratedOptimizer) for one in optimizers):
        message = (
            f"average() got {shown(optimizer)} as the optimiser; expected what accelerator.prepare() returned, which "
            "may replace the model's tensors: model, optimizer = accelerator.prepare(model, optimizer)"
        )
        raise ConfigError(message)
    averager = config.build(model)
    attach(optimizers, averager)
    checkpoints = _Checkpoints(accelerator, averager, config, model, unwrapped(optimizers[0]))
    accelerator.register_save_state_pre_hook(checkpoints.save)
    accelerator.register_load_state_pre_hook(checkpoints.load)
    return averager


def save_average(
    accelerator: Accelerator, averager: Averager, model: nn.Module, folder: str | os.PathLike[str]
) -> None:
    """Write the averaged model as ``save_pretrained``, or else ``accelerator.save_model``, writes the model itself.

    All processes call it.

    Args:
        accelerator: The accelerator.
        averager: What ``average`` returned.
        model: The prepared model.
        folder: Where to write it.

    Raises:
        ArgumentError: If ``averager`` is none.

    Examples:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> from polyak.integrations.accelerate import average, save_average
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> averager = average(accelerator, model, optimizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_average(accelerator, averager, model, folder)
        ...     print(*(path.name for path in Path(folder).iterdir()))
        model.safetensors
    """
    refuse_other("save_average", averager, model, "model, folder")
    plain: Any = accelerator.unwrap_model(model)
    with averager.applied():
        if not hasattr(plain, "save_pretrained"):
            accelerator.save_model(model, folder)
            return
        plain.save_pretrained(
            folder,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )


class _Checkpoints:
    """Saves and loads one averager with the states of an accelerator."""

    def __init__(
        self, accelerator: Accelerator, averager: Averager, config: AveragerConfig, model: nn.Module, inner: Optimizer
    ) -> None:
        self._accelerator, self._averager = accelerator, averager
        self._config, self._model, self._inner = config, model, inner
        number = getattr(accelerator, "_polyak_averagers", 0)
        accelerator._polyak_averagers = number + 1  # noqa: SLF001 - ours
        self._name = f"averager_{number}" if number else "averager"
        self._waits: RemovableHandle | None = None

    def save(self, models: Any, weights: Any, folder: str) -> None:
        """Write the average, before the accelerator writes its states.

        Raises:
            AppliedError: If the model holds the average, which would be saved as its weights.
        """
        if self._averager.is_applied:
            message = (
                "save_state() while the model holds the average would save the average as its weights; leave applied() "
                "first. save_average() writes the averaged model."
            )
            raise AppliedError(message)
        accelerator = self._accelerator
        each = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if each else accelerator.is_main_process
        beside.save_average(self._averager, Path(folder) / _FOLDER / self._name, writes=writes)

    def load(self, models: Sequence[nn.Module], folder: str) -> None:
        """Load the average, before the accelerator loads its states."""
        if self._waits is not None:
            self._waits.remove()
        place = Path(folder) / _FOLDER / self._name
        if beside.holds(place):
            beside.load_average(self._averager, place)
            return
        message = f"{folder!r} holds no average; the average begins anew from its weights"
        warn_user(message)
        if models:  # they are loaded next, and the optimiser's state after them
            self._waits = self._inner.register_load_state_dict_post_hook(lambda _: self._restart())
        else:
            self._restart()

    def _restart(self) -> None:
        if self._waits is not None:
            self._waits.remove()
            self._waits = None
        self._averager.load_state_dict(self._config.build(self._model).state_dict())
