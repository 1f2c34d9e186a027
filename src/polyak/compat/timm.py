"""timm's ``ModelEmaV3``, ``ModelEmaV2`` and ``ModelEma`` over polyak's engine."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from polyak.compat.following import followed
from polyak.errors.calls import warn_user

if TYPE_CHECKING:
    from polyak.engine.averager import Averager

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3", "use"]


class ModelEmaV3(nn.Module):
    """timm's ``ModelEmaV3``: a copy of a model that is the moving average of its weights and buffers.

    ``average += (1 - decay) * (weights - average)`` with ``decay = get_decay(step)``.

    Args:
        model: The model.
        decay: The largest decay.
        min_decay: The smallest decay of the warm-up.
        update_after_step: Steps in which the average is a copy.
        use_warmup: Whether the decay rises as ``1 - (1 + step / warmup_gamma) ** -warmup_power``.
        warmup_gamma: See there.
        warmup_power: See there.
        device: Where the average lives. Defaults to the model's device.
        dtype: How precisely it is stored. Defaults to the model's dtypes.
        stochastic_rounding: Whether averages in short dtypes are rounded at random; else to the nearest.
        stochastic_rounding_seed: The seed of that.
        foreach: Ignored: the fastest kernel is chosen.
        exclude_buffers: Whether buffers are copied.

    Attributes:
        module: The average, in eval mode.
        decay: The largest decay, as of the next update; so are the other arguments.

    Raises:
        MismatchError: At an update, if the model is another one.

    Matches: timm 1.0.31 to rounding. Differs: NaN is held, tied weights move once.

    Examples:
        >>> import torch
        >>> from polyak.compat.timm import ModelEmaV3
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
        >>> ema.update(model, step=3)
        >>> round(ema.get_decay(3), 3)
        0.519
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm's signature
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,  # noqa: FBT001, FBT002 - timm's signature
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,  # noqa: FBT001, FBT002 - as above
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,  # noqa: FBT001, FBT002 - as above
        exclude_buffers: bool = False,  # noqa: FBT001, FBT002 - as above
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.warmup_gamma, self.warmup_power = use_warmup, warmup_gamma, warmup_power
        self.device, self.dtype, self.foreach, self.exclude_buffers = device, dtype, foreach, exclude_buffers
        self.stochastic_rounding, self.stochastic_rounding_seed = stochastic_rounding, stochastic_rounding_seed
        if device is not None or dtype is not None:
            self.module.to(device=device, dtype=dtype)
        self._averager = followed(
            model,
            self.module,
            buffers="copy" if exclude_buffers else "auto",
            rounding="stochastic" if stochastic_rounding else "nearest",
            seed=stochastic_rounding_seed,
        )

    def get_decay(self, step: int | None = None) -> float:
        """Return the decay at a step; without one there is no warm-up."""
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        decay = 1.0 - float((1.0 + step / self.warmup_gamma) ** -self.warmup_power)
        return max(min(decay, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Take the weights of a model into the average.

        Args:
            model: The model.
            step: The optimiser step. Without it neither the warm-up nor ``update_after_step`` has an effect.
        """
        if step is None and (self.use_warmup or self.update_after_step):
            _warn_of_steps(self)
        _moved(self._averager, model, 1.0 - self.get_decay(step))

    def set(self, model: nn.Module) -> None:
        """Copy the weights of a model over the average."""
        _moved(self._averager, model, 1.0)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the average."""
        return self.module(*args, **kwargs)


class ModelEmaV2(nn.Module):
    """timm's ``ModelEmaV2``: ``average = decay * average + (1 - decay) * weights``, buffers too.

    Args:
        model: The model.
        decay: The decay.
        device: Where the average lives. Defaults to the model's device.

    Attributes:
        module: The average, in eval mode.
        decay: The decay, as of the next update.

    Raises:
        MismatchError: At an update, if the model is another one.

    Matches: timm 1.0.31 to rounding. Differs: NaN is held, tied weights move once, integers are copied.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay, self.device = decay, device
        if device is not None:
            self.module.to(device=device)
        self._averager = followed(model, self.module)

    def update(self, model: nn.Module) -> None:
        """Take the weights of a model into the average."""
        _moved(self._averager, model, 1.0 - self.decay)

    def set(self, model: nn.Module) -> None:
        """Copy the weights of a model over the average."""
        _moved(self._averager, model, 1.0)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the average."""
        return self.module(*args, **kwargs)


class ModelEma:
    """timm's first ``ModelEma``: ``ema = decay * ema + (1 - decay) * weights``, buffers too.

    Args:
        model: The model.
        decay: The decay.
        device: Where the average lives; "" is with the model.
        resume: A checkpoint of timm's whose ``state_dict_ema`` the average begins with.

    Attributes:
        ema: The average, in eval mode; its parameters require no gradient.
        ema_has_module: Whether the model was wrapped.
        decay: The decay, as of the next update.

    Raises:
        MismatchError: At an update, if the model is another one.

    Matches: timm 1.0.31 to rounding. Differs: NaN is held, tied weights move once, integers are copied.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, device: torch.device | str = "", resume: str = ""
    ) -> None:
        self.ema = copy.deepcopy(model).eval()
        self.decay, self.device = decay, device
        if device:
            self.ema.to(device=device)
        self.ema_has_module = hasattr(self.ema, "module")
        if resume:
            self._resume(resume)
        self.ema.requires_grad_(requires_grad=False)
        self._averager = followed(model, self.ema)

    def update(self, model: nn.Module) -> None:
        """Take the weights of a model into the average."""
        _moved(self._averager, model, 1.0 - self.decay)

    def _resume(self, path: str) -> None:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if "state_dict_ema" not in found:
            warn_user(f"the checkpoint {path!r} has no 'state_dict_ema'; the average begins with the model's weights")
            return
        wrapped = self.ema_has_module
        names = {name if not wrapped or name.startswith("module.") else f"module.{name}": value
                 for name, value in found["state_dict_ema"].items()}  # fmt: skip
        self.ema.load_state_dict(names)


def use() -> None:
    """Put these classes in the place of timm's, for scripts and tasks that look them up there."""
    for name in ("timm.utils", "timm.utils.model_ema", "timm.utils.model", "timm.task.task"):
        try:
            module = import_module(name)
        except ImportError:  # tasks came with a later release
            if name == "timm.utils":
                raise
            continue
        for own in (ModelEma, ModelEmaV2, ModelEmaV3):
            if hasattr(module, own.__name__):
                setattr(module, own.__name__, own)


def _moved(averager: Averager, model: nn.Module, rate: float) -> None:
    averager.update(model, rate=rate)
    averager.synchronize()  # a module is read as it is, where the model is on another device, too


def _warn_of_steps(ema: ModelEmaV3) -> None:
    if not getattr(ema, "_warned", False):
        ema._warned = True  # type: ignore[assignment]  # noqa: SLF001 - a module has types for tensors and modules only
        warn_user(
            "ModelEmaV3.update(model) without step= has no warm-up, and update_after_step no effect, as in timm; "
            "give step="
        )
