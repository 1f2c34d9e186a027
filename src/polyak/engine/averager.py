"""The averager: the object that holds the average and consumes the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from polyak.errors import ArgumentError
from polyak.errors.attributes import AttributeHints
from polyak.errors.formatting import shown, type_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor, nn

    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile
    from polyak.tensors.entries import Given

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
        """How many updates moved nothing because the weights held NaN or infinities."""

    @property
    def held(self) -> Mapping[str, int]:
        """How many elements of each tensor the last update held: ``nonfinite="hold"``, the default.

        They keep their old value, since the new one would not be finite; tensors without any are left out. Where a
        strategy makes several moves, it is the most that one of them held. Asks the device, and waits for it.

        Examples:
            >>> import polyak, torch, warnings
            >>> model = torch.nn.Linear(3, 1)
            >>> averager = polyak.average(model, "ema", decay=0.9)
            >>> with torch.no_grad():
            ...     _ = model.weight[0, 1].fill_(float("nan"))
            >>> with warnings.catch_warnings(action="ignore"):  # the first time it warns
            ...     averager.update()
            >>> dict(averager.held), averager.n
            ({'weight': 1}, 1)
        """

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
            UnboundError: If there is no model, or it is a mapping of tensors, which has no forward.
            ModelError: If the model cannot be rebuilt as a module; use ``applied()``.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return the forward pass through the average, without touching the model: ``module(*args, **kwargs)``."""

    def update(
        self,
        model: Given | None = None,
        *,
        step: int | None = None,
        lr: float | None = None,
        rate: float | None = None,
    ) -> None:
        """Move the average towards the current weights. Call it once per optimiser step.

        Args:
            model: The model. Defaults to the averager's own. Wrappers make no difference.
            step: The optimiser step, an integer (numpy's and torch's too). Defaults to a count of the calls.
            lr: The learning rate, a finite number, for strategies that use it.
            rate: The rate of this update, from 0 to 1, in place of the strategy's: ``1 - decay`` of an EMA. It is
                recorded, so that the profile and every synthesis know it.

        Raises:
            ConfigError: If ``step`` is no integer from 0 to 2**63 - 1, ``lr`` no finite number, or ``rate`` no number
                from 0 to 1, or the strategy moves several tensors by rates of its own.
            AppliedError: If the model holds the average now (inside ``applied()``).
            MismatchError: If the model lost, gained, renamed, reordered or reshaped parameters, or averaged buffers.
            RateError: If the strategy returned no finite number in [0, 1].
            NonFiniteError: If the weights hold NaN or infinities, under ``nonfinite="raise"``.
            UnboundError: If no model was given and there is none.

        Nothing has changed when one of these is raised.
        """

    def synchronize(self) -> None:
        """Wait for the last update if the average lives on another device than the model.

        The update runs in the background. Reading the average waits for it, and raises its errors.

        Raises:
            NonFiniteError: If the weights of that update held NaN or infinities, under ``nonfinite="raise"``.
        """

    def advance(self, *, step: int | None = None, lr: float | None = None) -> None:
        """Count an update that a CUDA graph or a compiled step is about to make, and put its rate on the device.

        For averagers built with ``capturable=True``. Inside a captured or compiled step, ``update()`` is tensor work
        only and reads the rate from a tensor. Call this before each replay; the next ``update()`` uses it up.

        Args:
            step: The optimiser step. Defaults to a count of the calls.
            lr: The learning rate, for strategies that use it.

        Raises:
            ConfigError: If the averager was built without ``capturable=True``.
            MismatchError: If the model's tensors were replaced, and a graph would go on with the old ones.
        """

    def configure(self, **settings: Any) -> None:
        """Change settings in the middle of a run: those of the strategy, and ``start``, ``every`` and ``nonfinite``.

        They take effect at the next update. The change is recorded: the profile and every resume stay exact, also into
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

    def to(self, device: str | int | torch.device | None = None, dtype: str | torch.dtype | None = None) -> None:
        """Move the average to another device or dtype; its values, counts and history stay.

        Args:
            device: The device. Defaults to where it is.
            dtype: How precisely it is stored, as in ``polyak.average``. Defaults to how it is; copied tensors stay.

        Raises:
            ConfigError: If there is no such device or dtype, or ranks, a captured graph or a list of yours hold the
                average.
            AppliedError: Inside ``applied()``.

        Examples:
            >>> import polyak, torch
            >>> averager = polyak.average(torch.nn.Linear(3, 1), "ema")
            >>> averager.to(dtype="float64")
            >>> averager.averages["weight"].dtype
            torch.float64
        """

    def pin_memory(self) -> None:
        """Put an average on the CPU into page-locked memory, from which copies to an accelerator do not wait.

        Raises:
            ConfigError: If there is no accelerator, or ``to()`` would raise.
            AppliedError: Inside ``applied()``.
        """

    def take_over(self, source: Any, *, n: int | None = None) -> None:  # noqa: ANN401 - whatever holds an average
        """Go on from an average of another library.

        What it took over counts as the start in the profile, since no record says which updates it consists of. A
        strategy that counts, such as ``swa``, goes on at the count.

        Args:
            source: An averaging object, its state dict, or a ``.pt`` file of one: timm's classes and checkpoints with
                ``state_dict_ema``, torch's ``AveragedModel``, torch_ema, diffusers, ema-pytorch, checkpoints of
                Lightning's callbacks; or a module, a mapping of names to tensors, or tensors in the model's order.
            n: How many updates it has. Defaults to the count that the source has, else to 0.

        Raises:
            StateError: If the source has no average of this model. Nothing has changed then.
            ConfigError: If ``n`` is no count, or the strategy keeps several tensors, or weighs updates and ``n`` is not
                0.
            AppliedError: Inside ``applied()``.

        Examples:
            >>> import polyak, torch
            >>> model = torch.nn.Linear(3, 1)
            >>> theirs = torch.optim.swa_utils.AveragedModel(model)
            >>> for _ in range(10):
            ...     theirs.update_parameters(model)
            >>> averager = polyak.average(model, "swa")
            >>> averager.take_over(theirs)
            >>> averager.update()
            >>> averager.n, round(averager.rate, 4)
            (11, 0.0909)
        """

    def applied(self, model: Given | None = None) -> AbstractContextManager[None]:
        """Return a context in which a model computes with the average. The original weights are restored on exit.

        Args:
            model: The model. Defaults to the averager's own.

        Contexts nest, and restore the same bits after exceptions. Parameters, gradients and optimiser state stay the
        same objects. Needs extra memory for one tensor, and for copies of averages that are stored in another dtype.

        The values are exchanged: statistics that batch norm writes in training mode go into the average, so evaluate
        with ``model.eval()``. Writing to parameters inside triggers a ``PolyakWarning``. Torch refuses the
        ``backward()`` of a graph that was recorded on the other side.

        One thread, or one task of an event loop, computes with the average; other threads wait until it has left.

        Raises:
            AppliedError: If another task is inside, or another thread that this one cannot wait for, or another model
                computes with the average; on leaving, if tensors got another shape or dtype inside. The original
                weights are restored.
            MismatchError: If ``model`` has other tensors.
        """

    def copy_to(self, model: Given | None = None) -> None:
        """Overwrite a model's weights with the average.

        Args:
            model: The model to overwrite. Defaults to the averager's own.

        Raises:
            AppliedError: If the model holds the average now: leaving ``applied()`` would restore its own weights.
            MismatchError: If ``model`` has other tensors.
        """

    def averaged_state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Return a copy of the average with the names, shapes and dtypes of the unwrapped ``model.state_dict()``.

        Args:
            full: Whether the tensors of a sharded model, otherwise DTensors of this rank's parts, are gathered on the
                CPU of rank 0. All ranks call it, and the others get ``{}``. A plain model is whole as it is.

        Raises:
            DistributedError: If a rank is gone.
        """

    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Return all that an exact resume needs: copies of tensors and plain types, fit for ``weights_only=True``.

        Args:
            full: Whether the tensors of a sharded model, otherwise DTensors of this rank's parts, are gathered on the
                CPU of rank 0. All ranks call it, and the others get ``{}``. Averagers of any layout and number of
                ranks load it.

        Raises:
            DistributedError: If a rank is gone.
            StateError: If a signal handler calls it in the middle of an update, or the memory of an average was freed.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume exactly where the state was taken. No tensor is stored in a shorter dtype than it had.

        A sharded averager takes its parts of whole tensors; give all ranks the same state.

        Raises:
            StateError: If ``state`` belongs to another model or strategy, is incomplete, or has a newer format.
            AppliedError: If the model holds the average now.
        """

    def profile(self) -> Profile:
        """Return the share of each update 1..n in the average."""

    def describe(self) -> str:
        """Describe the policy, storage, kernel and bytes of every tensor in words, and what the last update held."""

    def metrics(self) -> dict[str, float]:
        """Return what a run would log of the average; one pass over weights and averages, and nothing is kept.

        Returns:
            ``n``, ``rate``, ``skipped``; ``held``, the elements that the last update held; ``half_life`` in optimiser
            steps; ``distance``, the length of ``weights - average`` over the averaged parameters, and ``cosine``, that
            of their angle, both of this rank's parts where a model is sharded. NaN where there is none yet.

        Examples:
            >>> import polyak, torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> averager = polyak.average(model, "ema", decay=0.5)
            >>> with torch.no_grad():
            ...     model.weight += 1
            >>> averager.update()
            >>> found = averager.metrics()
            >>> found["n"], found["rate"], round(found["distance"], 3), found["held"]
            (1, 0.5, 0.5, 0)
        """


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
