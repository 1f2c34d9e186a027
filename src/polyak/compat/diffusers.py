"""diffusers' ``EMAModel`` over polyak's engine."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak.compat.following import Following
from polyak.errors import ConfigError, MismatchError, StateError, UnboundError
from polyak.errors.calls import warn_user
from polyak.errors.formatting import shown

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from typing import Self

__all__ = ["EMAModel"]

_KINDS: dict[str, type | tuple[type, ...]] = {
    "decay": (float, int), "min_decay": float, "optimization_step": int, "update_after_step": int,
    "use_ema_warmup": bool, "inv_gamma": (float, int), "power": (float, int),
}  # fmt: skip
_OLD = {"max_value": "decay", "min_value": "min_decay"}


class EMAModel:
    """diffusers' ``EMAModel``: shadow parameters that follow a model's.

    ``shadow += (1 - decay) * (parameter - shadow)`` with ``decay = get_decay(optimization_step)``. The first step
    copies, and parameters that require no gradient are copied at each.

    Args:
        parameters: The parameters, in order; or a module, which turns the warm-up on.
        decay: The largest decay.
        min_decay: The smallest decay after the first step.
        update_after_step: Steps in which the averages are copies.
        use_ema_warmup: Whether the decay rises as ``1 - (1 + step / inv_gamma) ** -power``; else as
            ``(1 + step) / (10 + step)``.
        inv_gamma: See there.
        power: See there.
        foreach: Ignored: the fastest kernel is chosen.
        model_cls: The model's class, for ``save_pretrained``.
        model_config: The model's config, for ``save_pretrained``.
        **kwargs: The names of older releases: ``max_value``, ``min_value``, ``device``.

    Attributes:
        shadow_params: The averages: a list that may be filled, changed and replaced.
        optimization_step: How many steps were made.
        cur_decay_value: The decay of the last step.
        temp_stored_params: What ``store`` kept.

    Raises:
        MismatchError: At a step, if the number or the shapes of parameters differ.

    Matches: diffusers 0.42.1 to rounding. Differs: NaN is held, and shapes are checked.

    Examples:
        >>> import torch
        >>> from polyak.compat.diffusers import EMAModel
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True)
        >>> for _ in range(3):
        ...     ema.step(model.parameters())
        >>> round(ema.cur_decay_value, 3)
        0.519
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,  # noqa: FBT001, FBT002 - as above
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,  # noqa: FBT001, FBT002 - as above
        model_cls: Any | None = None,  # noqa: ANN401 - diffusers brings no type for it
        model_config: Any | None = None,  # noqa: ANN401 - as above
        **kwargs: Any,
    ) -> None:
        for old, new in _OLD.items():
            if kwargs.get(old) is not None:
                warn_user(f"EMAModel({old}=...) is called {new}= now", FutureWarning)
        decay = kwargs["max_value"] if kwargs.get("max_value") is not None else decay
        min_decay = kwargs["min_value"] if kwargs.get("min_value") is not None else min_decay
        use_ema_warmup = use_ema_warmup or isinstance(parameters, nn.Module)
        self.shadow_params = [parameter.detach().clone() for parameter in _listed(parameters)]
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.optimization_step, self.foreach = 0, foreach
        self.cur_decay_value: float | None = None
        self.temp_stored_params: list[Tensor] | None = None
        self.model_cls, self.model_config = model_cls, model_config
        self._following, self._copied = Following(), Following()
        if kwargs.get("device") is not None:
            self.to(device=kwargs["device"])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model_cls: Any, foreach: bool = False) -> Self:  # noqa: ANN401, FBT001, FBT002 - diffusers' signature
        """Read the folder of a ``save_pretrained``, here or in diffusers."""
        _, state = model_cls.from_config(model_cls.load_config(path), return_unused_kwargs=True)
        model = model_cls.from_pretrained(path)
        made = cls(model.parameters(), model_cls=model_cls, model_config=model.config, foreach=foreach)
        made.load_state_dict(state)
        return made

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the averages as a model of diffusers, with the state in its config.

        Raises:
            UnboundError: If ``model_cls`` or ``model_config`` is not known; a ``ValueError``, too.
        """
        for name in ("model_cls", "model_config"):
            if getattr(self, name) is None:
                message = f"`save_pretrained` can only be used if `{name}` was defined at __init__."
                raise _UnknownModelError(message)
        model = self.model_cls.from_config(self.model_config)  # type: ignore[union-attr]  # checked above
        model.register_to_config(**{name: value for name, value in self.state_dict().items() if name in _KINDS})
        self.copy_to(model.parameters())
        model.save_pretrained(path)

    def get_decay(self, optimization_step: int) -> float:
        """Return the decay at a step."""
        step = max(0, optimization_step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        rising = 1 - (1 + step / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + step) / (10 + step)
        return float(max(min(rising, self.decay), self.min_decay))

    def step(self, parameters: Iterable[Tensor] | nn.Module) -> None:
        """Take parameters into the averages."""
        live = _listed(parameters)
        if len(live) != len(self.shadow_params):
            message = f"got {len(live)} parameters; expected {len(self.shadow_params)}, as there are averages"
            raise MismatchError(message)
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for following, trained, rate in (
            (self._following, True, 1.0 - self.cur_decay_value),
            (self._copied, False, 1.0),
        ):
            pairs = [(s, p) for s, p in zip(self.shadow_params, live, strict=True) if p.requires_grad is trained]
            following.update([s for s, _ in pairs], [p for _, p in pairs], rate)

    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Copy the averages over parameters."""
        for parameter, average in zip(parameters, self.shadow_params, strict=True):
            parameter.data.copy_(average.data)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep the values of parameters on the CPU for ``restore``."""
        self.temp_stored_params = [parameter.detach().cpu().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Copy what was stored over parameters, and forget it.

        Raises:
            UnboundError: If nothing was stored; it is a ``RuntimeError``, too.
        """
        if self.temp_stored_params is None:
            message = "This ExponentialMovingAverage has no `store()`ed weights to `restore()`"
            raise UnboundError(message)
        for parameter, stored in zip(parameters, self.temp_stored_params, strict=True):
            parameter.data.copy_(stored.data)
        self.temp_stored_params = None

    def pin_memory(self) -> None:
        """Move the averages into page-locked memory."""
        self.shadow_params = [tensor.pin_memory() for tensor in self.shadow_params]

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> None:  # noqa: ANN401, FBT001, FBT002 - diffusers' signature
        """Move the averages to a device or dtype."""
        self.shadow_params = [
            tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=non_blocking)
            for tensor in self.shadow_params
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of eight keys: references, no copies."""
        return {**{name: getattr(self, name) for name in _KINDS}, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of diffusers, or a part of one; whole or not at all.

        Raises:
            StateError: If a value has a wrong type; it is a ``ValueError``, too.
        """
        state = copy.deepcopy(state_dict)
        new = {name: state.get(name, getattr(self, name)) for name in _KINDS}
        for name, kind in _KINDS.items():
            if not isinstance(new[name], kind):
                message = f"Invalid {name}: got {shown(new[name])}"
                raise StateError(message)
        if not 0.0 <= new["decay"] <= 1.0:
            message = f"Decay must be between 0 and 1; got {new['decay']}"
            raise ConfigError(message)
        averages = state.get("shadow_params")
        if averages is not None and not (isinstance(averages, list) and all(isinstance(t, Tensor) for t in averages)):
            message = "shadow_params must all be Tensors, in a list"
            raise StateError(message)
        vars(self).update(new)
        if averages is not None:
            self.shadow_params = averages


class _UnknownModelError(UnboundError, ValueError):
    """The class or the config of the model is not known."""


def _listed(parameters: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    return [*(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)]
