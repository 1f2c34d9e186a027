"""ema-pytorch's ``EMA`` over polyak's engine."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from polyak.compat.following import Following
from polyak.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch.utils.hooks import RemovableHandle

__all__ = ["EMA"]


class EMA(nn.Module):
    """ema-pytorch's ``EMA``: a copy of a model that is the moving average of its weights and floating buffers.

    ``average += (1 - decay) * (weights - average)`` at every ``update_every``-th call, with
    ``decay = 1 - (1 + step / inv_gamma) ** -power``, between ``min_value`` and ``beta``.

    Args:
        model: The model that is trained.
        ema_model: Your own module for the average, or a function that makes it. Defaults to a copy of the model.
        beta: The largest decay; 1 freezes the average.
        update_after_step: Calls in which the average is a copy.
        update_every: The average moves at every so many calls.
        inv_gamma: See above.
        power: See above.
        min_value: The smallest decay.
        param_or_buffer_names_no_ema: Names of tensors that are copied.
        ignore_names: Names of tensors that are left alone.
        ignore_startswith_names: Beginnings of such names.
        include_online_model: Whether the model is a part of this module, and of its state dict.
        allow_different_devices: Ignored: other devices are always allowed.
        use_foreach: Ignored: the fastest kernel is chosen.
        update_model_with_ema_every: Copy the average over the model at every so many calls.
        update_model_with_ema_beta: How much of the model's weights that keeps.
        forward_method_names: Methods of the average's module that become methods of this one.
        move_ema_to_online_device: Whether the average follows the model to its device.
        coerce_dtype: Ignored: other dtypes are always allowed.
        lazy_init_ema: Whether the copy is made at the first update.

    Attributes:
        ema_model: The average.
        online_model: The model, or a list of it.
        initted: Whether the average was filled. A tensor of shape ().
        step: How often ``update`` was called. A tensor of shape ().

    Raises:
        ModelError: If the model cannot be copied.

    Matches: ema-pytorch 0.8.3 to rounding. Differs: NaN is held.

    Examples:
        >>> import torch
        >>> from polyak.compat.ema_pytorch import EMA
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = EMA(model, beta=0.99, update_after_step=0, update_every=1)
        >>> ema.update()
        >>> y = ema(torch.zeros(1, 2))
    """

    initted: Tensor
    step: Tensor

    def __init__(  # noqa: PLR0913, PLR0917 - ema-pytorch's signature
        self,
        model: nn.Module,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        param_or_buffer_names_no_ema: Collection[str] = frozenset(),
        ignore_names: Collection[str] = frozenset(),
        ignore_startswith_names: Collection[str] = frozenset(),
        include_online_model: bool = True,  # noqa: FBT001, FBT002 - as above
        allow_different_devices: bool = False,  # noqa: FBT001, FBT002 - as above
        use_foreach: bool = False,  # noqa: FBT001, FBT002 - as above
        update_model_with_ema_every: int | None = None,
        update_model_with_ema_beta: float = 0.0,
        forward_method_names: tuple[str, ...] = (),
        move_ema_to_online_device: bool = False,  # noqa: FBT001, FBT002 - as above
        coerce_dtype: bool = False,  # noqa: FBT001, FBT002 - as above
        lazy_init_ema: bool = False,  # noqa: FBT001, FBT002 - as above
    ) -> None:
        super().__init__()
        self.beta, self.is_frozen = beta, beta == 1.0
        self.include_online_model = include_online_model
        self.online_model: Any = model if include_online_model else [model]
        self.forward_method_names = forward_method_names
        self.update_after_step, self.update_every = update_after_step, update_every
        self.inv_gamma, self.power, self.min_value = inv_gamma, power, min_value
        self.param_or_buffer_names_no_ema = param_or_buffer_names_no_ema
        self.ignore_names, self.ignore_startswith_names = ignore_names, ignore_startswith_names
        self.allow_different_devices, self.use_foreach, self.coerce_dtype = (
            allow_different_devices, use_foreach, coerce_dtype,
        )  # fmt: skip
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.move_ema_to_online_device = move_ema_to_online_device
        self._averaging, self._returning, self._copying = Following(), Following(), Following()
        self.ema_model: Any = None
        if not lazy_init_ema:
            self.init_ema(ema_model() if not isinstance(ema_model, nn.Module) and callable(ema_model) else ema_model)
        self.register_buffer("initted", torch.tensor(False, device="cpu"))  # noqa: FBT003 - its first value
        self.register_buffer("step", torch.tensor(0, device="cpu"))

    def init_ema(self, ema_model: nn.Module | None = None) -> None:
        """Make the average's module.

        Raises:
            ModelError: If the model cannot be copied.
        """
        try:
            ema_model = copy.deepcopy(self.model) if ema_model is None else ema_model
            for parameter in ema_model.parameters():
                parameter.detach_()
        except Exception as error:  # whatever the model raises; lazy parameters cannot be detached
            message = f"the model cannot be copied ({type(error).__name__}: {error}); give ema_model="
            raise ModelError(message) from error
        self.ema_model = ema_model
        for name in self.forward_method_names:
            setattr(self, name, getattr(ema_model, name))
        self.parameter_names = {name for name, tensor in ema_model.named_parameters() if _averaged(tensor)}
        self.buffer_names = {name for name, tensor in ema_model.named_buffers() if _averaged(tensor)}

    def add_to_optimizer_post_step_hook(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update after each step of an optimiser; return the handle of the hook."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        found: nn.Module = self.online_model if self.include_online_model else self.online_model[0]
        return found

    @override
    def eval(self) -> Any:
        """Put the average into eval mode, and return it."""
        return self.ema_model.eval()

    @torch.no_grad()
    def forward_eval(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Compute with the average, without gradients."""
        training = self.ema_model.training
        made = self.ema_model(*args, **kwargs)
        self.ema_model.train(training)
        return made

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the average."""
        return self.ema_model(*args, **kwargs)

    def restore_ema_model_device(self) -> None:
        """Move the average to the device of this module's counts."""
        self.ema_model.to(self.initted.device)

    def get_params_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the averaged parameters of a model, by name."""
        return ((name, tensor) for name, tensor in model.named_parameters() if name in self.parameter_names)

    def get_buffers_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the averaged buffers of a model, by name."""
        return ((name, tensor) for name, tensor in model.named_buffers() if name in self.buffer_names)

    def copy_params_from_model_to_ema(self) -> None:
        """Copy the model's weights over the average."""
        self._copying.update(self._tensors(self.ema_model), self._tensors(self.model), 1.0)

    def copy_params_from_ema_to_model(self) -> None:
        """Copy the average over the model's weights."""
        with torch.no_grad():
            for weight, average in zip(self._tensors(self.model), self._tensors(self.ema_model), strict=True):
                weight.data.copy_(average.data)

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """Move the model's weights to the average; they keep the share ``decay`` of themselves."""
        decay = self.update_model_with_ema_beta if decay is None else decay
        if decay == 0.0:
            self.copy_params_from_ema_to_model()
        else:
            self.update_moving_average(self.model, self.ema_model, decay)

    def get_current_decay(self) -> float:
        """Return the decay of an update that is made now."""
        epoch = float(self.step) - self.update_after_step - 1
        if epoch <= 0:
            return 0.0
        rising = float(1 - (1 + epoch / self.inv_gamma) ** -self.power)
        return min(max(rising, self.min_value), self.beta)

    def update(self) -> None:
        """Count a step, and take the model's weights into the average where it is due."""
        step = int(self.step)
        self.step += 1
        if not self.initted:
            if self.ema_model is None:
                self.init_ema()
            self.copy_params_from_model_to_ema()
            self.initted.fill_(True)  # noqa: FBT003 - its value
            return
        due = step % self.update_every == 0
        if due and step <= self.update_after_step:
            self.copy_params_from_model_to_ema()
            return
        if due:
            self.update_moving_average(self.ema_model, self.model)
        if self.update_model_with_ema_every is not None and step % self.update_model_with_ema_every == 0:
            self.update_model_with_ema()

    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """Move one model's weights towards another's."""
        if self.is_frozen:
            return
        if self.move_ema_to_online_device:
            ma_model.to(next(current_model.parameters()).device)
        decay = self.get_current_decay() if current_decay is None else current_decay
        following = self._averaging if ma_model is self.ema_model else self._returning
        averages: list[Tensor] = []
        live: list[Tensor] = []
        for (name, source), (_, target) in zip(self._named(current_model), self._named(ma_model), strict=True):
            if self._ignored(name):
                continue
            if name in self.param_or_buffer_names_no_ema:
                target.detach().copy_(source.detach())
                continue
            averages.append(target)
            live.append(source)
        following.update(averages, live, 1.0 - decay)

    def _ignored(self, name: str) -> bool:
        return name in self.ignore_names or any(map(name.startswith, self.ignore_startswith_names))

    def _named(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return chain(self.get_params_iter(model), self.get_buffers_iter(model))

    def _tensors(self, model: nn.Module) -> list[Tensor]:
        return [tensor for _, tensor in self._named(model)]


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
