"""torch's ``AveragedModel`` over polyak's engine, and the functions that go with it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import (
    SWALR,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)
from typing_extensions import override

from polyak.compat.following import followed
from polyak.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

_PROBES = (0.0, 1.0, 2.0), (1.0, 0.0, 3.0)
_SAME = 1e-6


class BothFunctionsError(ArgumentError, AssertionError):
    """Both averaging functions were given."""


class AveragedModel(nn.Module):
    """``torch.optim.swa_utils.AveragedModel``: a copy of a model that is the average of its weights.

    ``average += (weights - average) / (n_averaged + 1)``, or what ``avg_fn`` or ``multi_avg_fn`` makes of both.

    Args:
        model: The model.
        device: Where the average lives. Defaults to the model's device.
        avg_fn: Returns the new average of an average, a weight and ``n_averaged``; an affine function of the first two.
        multi_avg_fn: The same in place, for lists of them.
        use_buffers: Whether floating buffers are averaged; else all are copied.

    Attributes:
        module: The average.
        n_averaged: How many updates it has; set it to 0 to begin anew. A long tensor of shape ().

    Raises:
        ConfigError: At an update, if a function is not ``average + rate * (weight - average)`` with a rate from 0 to 1.
        MismatchError: At an update, if the model is another one.

    Matches: torch 2.15.0 to rounding. Differs: NaN is held, other models are refused, tied weights move once.

    Often confused with: ``polyak.average``, which needs no copy of the model's modules and remembers its updates.

    Examples:
        >>> import torch
        >>> from polyak.compat.torch import AveragedModel
        >>> model = torch.nn.Linear(2, 1)
        >>> averaged = AveragedModel(model)
        >>> averaged.update_parameters(model)
        >>> int(averaged.n_averaged), [*averaged.state_dict()]
        (1, ['n_averaged', 'module.weight', 'module.bias'])
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: int | str | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[Any, Any, Tensor | int], None] | None = None,
        use_buffers: bool = False,  # noqa: FBT001, FBT002 - torch's signature
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            message = "AveragedModel takes avg_fn or multi_avg_fn; got both"
            raise BothFunctionsError(message)
        self.module = copy.deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device or "cpu"))
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers
        self._averager = followed(model, self.module, buffers="auto" if use_buffers else "copy")

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the average."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of a model into the average."""
        self._averager.update(model, rate=self._rate() if self.n_averaged else 1.0)
        self._averager.synchronize()
        self.n_averaged += 1

    def _rate(self) -> float:
        if self.avg_fn is None and self.multi_avg_fn is None:
            return 1.0 / (int(self.n_averaged) + 1)
        old, new = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in _PROBES)
        n = self.n_averaged.cpu()
        if self.multi_avg_fn is not None:
            moved = old.clone()
            self.multi_avg_fn([moved], [new], n)
        else:
            moved = cast("Any", self.avg_fn)(old.clone(), new, n)
        rate = float(moved[0])
        expected = old + rate * (new - old)
        if not 0.0 <= rate <= 1.0 or not torch.allclose(moved, expected, rtol=0.0, atol=_SAME):
            message = (
                f"the averaging function makes {moved.tolist()} of the averages {old.tolist()} and the weights "
                f"{new.tolist()}; expected average + rate * (weight - average) with a rate from 0 to 1"
            )
            raise ConfigError(message)
        return rate
