"""torch_ema's ``ExponentialMovingAverage`` over polyak's engine."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.compat.following import Following
from polyak.errors import ConfigError, MismatchError, StateError, UnboundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ExponentialMovingAverage"]


class LostParametersError(MismatchError, UnboundError):
    """Parameters were freed."""


class InvalidStateError(StateError, AssertionError):
    """A state of another kind."""


class ExponentialMovingAverage:
    """torch_ema's ``ExponentialMovingAverage``: shadow parameters that follow a model's.

    ``shadow += (1 - decay) * (parameter - shadow)``, with ``decay = min(decay, (1 + n) / (10 + n))`` at update ``n`` if
    ``use_num_updates``.

    Args:
        parameters: The parameters, in order.
        decay: The decay, from 0 to 1.
        use_num_updates: Whether the decay warms up.

    Attributes:
        decay: The decay, as of the next update.
        num_updates: How many updates were made; None without warm-up.
        shadow_params: The averages: a list that may be filled, changed and replaced.
        collected_params: What ``store`` kept.

    Raises:
        ConfigError: If ``decay`` is not from 0 to 1; it is a ``ValueError``, too.
        MismatchError: If a method is given another number of parameters, or other shapes; a ``ValueError``, too.

    Matches: torch-ema 0.3 to rounding. Differs: NaN is held, and shapes are checked.

    Examples:
        >>> import torch
        >>> from polyak.compat.torch_ema import ExponentialMovingAverage
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ExponentialMovingAverage(model.parameters(), decay=0.995)
        >>> ema.update()
        >>> with ema.average_parameters():
        ...     y = model(torch.zeros(1, 2))
    """

    decay: float
    num_updates: int | None
    shadow_params: list[Tensor]
    collected_params: list[Tensor] | None
    _params_refs: tuple[weakref.ref[Tensor], ...] = ()
    _following: Following | None = None

    def __init__(self, parameters: Iterable[Tensor], decay: float, use_num_updates: bool = True) -> None:  # noqa: FBT001, FBT002 - torch_ema's signature
        self.decay = _checked(decay)
        self.num_updates = 0 if use_num_updates else None
        parameters = [*parameters]
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]
        self.collected_params = None
        self._params_refs = tuple(map(weakref.ref, parameters))

    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Take parameters into the averages; those of the beginning, unless others are given."""
        given, decay = self._given(parameters), self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        self._following = self._following or Following()
        self._following.update(self.shadow_params, given, 1.0 - decay)

    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Copy the averages over parameters."""
        _copy(self._given(parameters), self.shadow_params)

    def store(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Keep the values of parameters for ``restore``."""
        self.collected_params = [parameter.clone() for parameter in self._given(parameters)]

    def restore(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Copy what was stored over parameters.

        Raises:
            UnboundError: If nothing was stored; it is a ``RuntimeError``, too.
        """
        if self.collected_params is None:
            message = "This ExponentialMovingAverage has no `store()`ed weights to `restore()`"
            raise UnboundError(message)
        _copy(self._given(parameters), self.collected_params)

    @contextmanager
    def average_parameters(self, parameters: Iterable[Tensor] | None = None) -> Iterator[None]:
        """Let parameters be the averages inside the context."""
        given = self._given(parameters)
        self.store(given)
        try:
            self.copy_to(given)
            yield
        finally:
            self.restore(given)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> None:  # noqa: ANN401 - whatever names a device
        """Move the averages to a device or dtype."""
        self.shadow_params = [_to(tensor, device, dtype) for tensor in self.shadow_params]
        if self.collected_params is not None:
            self.collected_params = [_to(tensor, device, dtype) for tensor in self.collected_params]

    def state_dict(self) -> dict[str, Any]:
        """Return the state: references, no copies."""
        names = ("decay", "num_updates", "shadow_params", "collected_params")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch_ema; whole or not at all.

        Raises:
            StateError: If it is no such state; it is an ``AssertionError`` or a ``ValueError``, too.
        """
        state = copy.deepcopy(state_dict)
        decay, count = _checked(state["decay"]), state["num_updates"]
        shadow, collected = state["shadow_params"], state["collected_params"]
        _require(count is None or isinstance(count, int), "Invalid num_updates")
        _require(_are_tensors(shadow), "shadow_params must all be Tensors, in a list")
        _require(collected is None or _are_tensors(collected), "collected_params must all be Tensors, in a list")
        same = collected is None or len(collected) == len(shadow)
        _require(same, "collected_params and shadow_params had different lengths")
        if len(shadow) != len(self._params_refs):
            message = f"the state has {len(shadow)} parameters; expected {len(self._params_refs)}"
            raise StateError(message)
        live = [ref() for ref in self._params_refs]
        if not any(parameter is None for parameter in live):
            likes = [parameter for parameter in live if parameter is not None]
            shadow = [tensor.to(like.device, like.dtype) for tensor, like in zip(shadow, likes, strict=True)]
            if collected is not None:
                collected = [tensor.to(like.device, like.dtype) for tensor, like in zip(collected, likes, strict=True)]
        self.decay, self.num_updates = decay, count
        self.shadow_params, self.collected_params = shadow, collected

    def _given(self, parameters: Iterable[Tensor] | None) -> list[Tensor]:
        if parameters is not None:
            given = [*parameters]
            if len(given) != len(self.shadow_params):
                message = f"got {len(given)} parameters; expected {len(self.shadow_params)}, as there are averages"
                raise MismatchError(message)
            return given
        found = [ref() for ref in self._params_refs]
        live = [parameter for parameter in found if parameter is not None]
        if len(live) < len(found):
            message = (
                "(One of) the parameters of this ExponentialMovingAverage no longer exists (was garbage "
                "collected); give parameters, or keep the model"
            )
            raise LostParametersError(message)
        return live


def _checked(decay: float) -> float:
    if not 0.0 <= decay <= 1.0:
        message = f"Decay must be between 0 and 1; got {decay}"
        raise ConfigError(message)
    return decay


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.data.copy_(source.data)


def _to(tensor: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:  # noqa: ANN401 - as above
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _are_tensors(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(tensor, Tensor) for tensor in value)


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 - it is what was checked
    if not holds:
        raise InvalidStateError(message)
