"""The averager: the object that holds the average and consumes the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from polyak.errors import ArgumentError
from polyak.errors.attributes import AttributeHints
from polyak.errors.formatting import shown, type_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile
    from polyak.tensors.entries import Model

__all__ = ["Averager", "refuse_other"]

_TYPE_ONLY = "polyak.Averager is the type of averagers; make one by polyak.average(model, 'ema', decay=0.999)"


@runtime_checkable
class Averager(Protocol):
    """A running average of a model's weights: ``average += rate * (weights - average)`` at each update.

    Made by ``polyak.average``. It holds tensors, not a copy of the model, so models that cannot be copied work.

    Often confused with: ``torch.optim.swa_utils.AveragedModel``, which is a module with a copy of the
    model inside. An averager becomes a module only where you ask for ``.module``.

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> averager = polyak.average(model, "ema", decay=0.9)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> averager.update()
        >>> averager.n, round(averager.rate, 6)
        (1, 0.1)
        >>> with averager.applied():
        ...     y = model(torch.zeros(2, 3))
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Return a new averager; only the classes of ``polyak.average`` have any."""
        if cls is Averager:
            raise ArgumentError(_TYPE_ONLY)
        return super().__new__(cls)

    @property
    def strategy(self) -> Strategy:
        """The strategy: frozen settings and the rate."""

    @property
    def n(self) -> int:
        """How many updates were averaged."""

    @property
    def rate(self) -> float | None:
        """The rate that the last averaged update used; None before the first."""

    @property
    def skipped(self) -> int:
        """How many updates were left out because the weights held NaN or infinities."""

    @property
    def is_applied(self) -> bool:
        """Whether the model holds the average now; a checkpoint of the model saved now has the average in it."""

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """A read-only mapping of canonical name to the stored tensor itself (not a copy), in the model's order."""

    @property
    def module(self) -> nn.Module:
        """A module in eval mode that computes with the average; made on first use and kept in step.

        Hold it, or a part of it: after each update it computes what ``applied()`` would, by any method, submodule or
        compiled form. Using it changes neither the model nor the average.

        A parameter shares the memory of its average if that has the model's dtype and device, and costs nothing then.
        A parameter that is not averaged shares the model's memory. Do not write shared parameters in place:
        take ``copy.deepcopy(averager.module)`` to train or edit it. Copied are averages in another dtype or on another
        device, buffers, and all tensors below a module with its own ``train()``, ``eval()`` or ``merge()``. Copies are
        written at an update only while something refers to the module, a submodule or a tensor of it; an offloaded
        update is waited for then.

        - Attributes are those of the model at the last update, access, or call of the module. Containers are copied;
          other objects (a config, a replay buffer, an optimiser) are shared, unless they refer to the model.
        - In train mode it moves buffers of its own. The average's are restored by the next update or call in eval
          mode. Buffers that are skipped follow the model's until the module writes them, and are its own afterwards.
        - It has the forward hooks that the model's own classes made. Others stay on the model, with a warning.
        - Once ``half()`` or another tool changed its structure in place, the next access builds another module.
        - Copies, pickles, scripts and exports of it are plain modules and need no polyak.

        Raises:
            UnboundError: There is no model, or a mapping of tensors, which has no forward.
            ModelError: The model cannot be rebuilt as a module; use ``applied()``.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return the forward pass through the average, without touching the model: ``module(*args, **kwargs)``."""

    def update(self, model: Model | None = None, *, step: int | None = None, lr: float | None = None) -> None:
        """Take the weights as they are now into the average; call it once per real optimiser step.

        Args:
            model: The model; the one the averager was made for where it is None. Wrappers make no difference.
            step: The optimiser step, an integer (numpy's and torch's too). Defaults to a count of the calls.
            lr: The learning rate, a finite number, for strategies that use it.

        Raises:
            ConfigError: If ``step`` is no integer from 0 to 2**63 - 1, or ``lr`` no finite number.
            AppliedError: The model holds the average now (inside ``applied()``).
            MismatchError: The model lost, gained, renamed, reordered or reshaped parameters, or averaged buffers.
            RateError: The strategy returned no finite number in [0, 1].
            NonFiniteError: NaN or infinities in the weights, under ``nonfinite="raise"``.
            UnboundError: No model was given and there is none.

        Nothing has changed when one of these is raised.
        """

    def synchronize(self) -> None:
        """Wait until the last update is done, where the average lives on another device than the model.

        Such an update goes on beside the training. Whatever reads the average waits by itself; an error is raised then.

        Raises:
            NonFiniteError: The weights of that update held NaN or infinities, under ``nonfinite="raise"``.
        """

    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
        """Count an update that a CUDA graph or a compiled step is about to make, and put its rate on the device.

        For averagers built with ``capturable=True``: inside what is captured or compiled ``update()`` is tensor work
        only and reads the rate from a tensor; call this before each replay. The next ``update()`` uses it up, compiled
        or not.

        Args:
            step: The optimiser step; calls are counted where it is None.
            lr: The learning rate, for strategies that use it.

        Raises:
            ConfigError: The averager was built without ``capturable=True``.
            MismatchError: The model's tensors were replaced, and a graph would go on with the old ones.
        """

    def configure(self, **settings: Any) -> None:
        """Change settings in the middle of a run: those of the strategy, and ``start``, ``every`` and ``nonfinite``.

        They count from the next update on. The change is recorded: the profile and every resume stay exact, also into
        an averager that is built as this one was.

        Args:
            **settings: The new values, validated as in ``polyak.average``.

        Raises:
            ConfigError: If there is no such setting, its value is wrong, or it is fixed when an averager is built
                (where an average lives; how many tensors a strategy keeps). Nothing has changed then.

        Examples:
            >>> import polyak, torch
            >>> averager = polyak.average(torch.nn.Linear(3, 1), "ema", decay=0.9)
            >>> averager.configure(decay=0.99)
            >>> averager.strategy.decay
            0.99
        """

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes with the average; after it, with its own weights, bit for bit.

        Nests, and restores after exceptions. Parameters, gradients and optimiser state stay the same objects.
        Needs one tensor's worth of extra memory, and a copy of those tensors whose average is stored in another dtype.

        The values are exchanged: statistics that batch norm writes in training mode go into the average, so evaluate
        with ``model.eval()``. Writing to parameters inside triggers a ``PolyakWarning``. Torch refuses the
        ``backward()`` of a graph that was recorded on the other side.

        One thread, or one task of an event loop, computes with the average; other threads wait until it has left.

        Raises:
            AppliedError: If another task is inside, or another thread that this one cannot wait for; on leaving, if
                tensors got another shape or dtype inside. The original weights are restored.
        """

    def copy_to(self, model: Model | None = None) -> None:
        """Overwrite a model's weights with the average for good.

        Args:
            model: The model to overwrite; the one the averager was made for where it is None.

        Raises:
            AppliedError: The model holds the average now; it would get its own weights back afterwards.
            MismatchError: It has other tensors.
        """

    def averaged_state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Return copies with the names, shapes and dtypes of the unwrapped ``model.state_dict()``: load it anywhere.

        Args:
            full: Whether the tensors of a sharded model, otherwise DTensors of this rank's parts, are gathered on the
                CPU of rank 0. All ranks call it, and the others get ``{}``. A plain model is whole as it is.

        Raises:
            DistributedError: A rank is gone.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs: copies of tensors and plain types, fit for ``weights_only=True``.

        Raises:
            StateError: A signal handler calls it in the middle of an update; or the memory of an average was freed.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the state was taken; a tensor is never stored in a shorter dtype than it comes with.

        Raises:
            StateError: It belongs to another model or strategy, is incomplete, or of a newer format.
            AppliedError: The model holds the average now.
        """

    def profile(self) -> Profile:
        """Return what each update 1..n counts in the average now."""

    def describe(self) -> str:
        """Return in words what is done with every tensor: policy, storage, kernel, bytes."""


def refuse_other(call: str, value: object, other: object, second: str) -> None:
    """Refuse what is no averager, and ask about swapped arguments.

    Args:
        call: The name of the function.
        value: What was given as the averager.
        other: What was given after it.
        second: The name of that argument.

    Raises:
        ArgumentError: If ``value`` is no averager and no bank.
    """
    if isinstance(value, AttributeHints):
        return
    if isinstance(other, AttributeHints):
        message = (
            f"{call}() got {shown(value)} first and the {type_name(other)} after it: are the arguments swapped? "
            f"It is polyak.{call}({type_name(other)}, {second})"
        )
    else:
        message = f"{call}() got {shown(value)} as the averager; expected what polyak.average() returns"
    raise ArgumentError(message)
