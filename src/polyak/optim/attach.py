"""The update as a hook of the optimiser: once per real step, wherever in the loop that is made."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from typing_extensions import override

from polyak.engine.sources import Source, Sources
from polyak.errors import AppliedError, ArgumentError, ConfigError, MismatchError, UnboundError
from polyak.errors.attributes import AttributeHints
from polyak.errors.formatting import shown, type_name
from polyak.optim.stepping import inner_optimizer, makes_state, refuse_shard, run_last, step_hooks, unwrapped
from polyak.tensors.entries import identity, walk

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from polyak.tensors.entries import Model

__all__ = ["Attachment", "Update", "attach", "attached"]


class _Updates(Protocol):
    """What is attached: an averager, or anything else that is updated like one."""

    def update(self, *, lr: float | None = None) -> None: ...


@runtime_checkable
class Guarded(Protocol):
    """An averager whose updates may go on reading the weights after ``update()`` has returned."""

    def guard(self, by: int) -> None:
        """Count one optimiser more, or less, that calls ``release`` before each step."""

    def release(self) -> None:
        """Let the weights be overwritten by what is enqueued from now on, once they were read."""


class Attachment:
    """An averager's hooks on an optimiser; ``remove()``, or leaving it as a context, takes them off.

    Args:
        guarded: The averager, where the hooks keep the optimiser from overwriting weights that are still read.
        handles: What torch returned for each hook, or the attachments of several optimisers.
    """

    def __init__(self, guarded: Guarded | None, handles: Sequence[RemovableHandle | Attachment]) -> None:
        self._guarded, self._handles = guarded, handles
        if guarded is not None:
            guarded.guard(1)

    def remove(self) -> None:
        """Take the hooks off; the optimiser no longer holds the averager. Twice is once."""
        for handle in self._handles:
            handle.remove()
        if self._guarded is not None:
            self._guarded.release()
            self._guarded.guard(-1)
            self._guarded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(optimizer: Optimizer | Sequence[Optimizer], averager: _Updates) -> Attachment:
    """Update an averager after each real step of an optimiser: ``averager.update(lr=...)`` as a step hook.

    Batches whose gradients are only accumulated, the inner evaluations of a closure (LBFGS), the steps that a
    ``GradScaler`` leaves out, and those by which ``torch.distributed.checkpoint`` makes a state to load into (all
    learning rates and gradients are zero) are no steps. The learning rate is that of the first parameter group, as a
    float; where it is a tensor on an accelerator, reading it waits for the device, and so does asking a fused
    optimiser under a ``GradScaler`` whether it left a step out.

    Where several optimisers train one model, attach them all: ``attach([muon, adamw], averager)``. They make one
    update together, behind the last one's step, with the learning rate of the first. Where one of them does not step
    (another phase, gradients that overflowed), the update is made before the next step of the others, which do not
    wait for it again until it steps. Step them in the same order each time: the order shows that a round has begun
    where the first one was skipped. To update after the steps of one of them alone, attach only that one.

    An optimiser that holds the one that steps (SAM with ``first_step()`` and ``second_step()``, Lookahead) counts once
    per step of that one. The wrappers of Accelerate, Lightning and Fabric are unwrapped.

    The update comes after the optimiser's other step hooks, whenever these were registered. It comes before hooks for
    all optimisers (``register_optimizer_step_post_hook``): where such a hook changes weights, call ``update()``
    yourself.

    Args:
        optimizer: The optimiser that trains the averager's model, an optimiser around it, or a list of optimisers
            that train different parameters of it.
        averager: What ``polyak.average`` returned.

    Returns:
        A handle: ``remove()`` ends it, and so does leaving it as a context. Copied optimisers have no hooks.

    Raises:
        ConfigError: If the optimiser runs no step hooks, ``averager`` is none, they are attached already, or the list
            is empty. By the first step: the optimiser is the local part of a ``ZeroRedundancyOptimizer``.
        MismatchError: If the optimiser changes no tensor of the averager's model.
        UnboundError: If the averager has no model (it was unpickled).

    Often confused with: ``loss.register_hook`` and gradient hooks, which run once per ``backward()`` and so several
    times per step where gradients are accumulated.

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> averager = polyak.average(model, "ema", decay=0.9)
        >>> with polyak.attach(optimizer, averager):
        ...     for batch in range(6):
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         if batch % 3 == 2:
        ...             optimizer.step()
        >>> averager.n
        2
    """
    if not isinstance(optimizer, Sequence):
        return attached(optimizer, Update(averager))
    if not optimizer:
        message = "attach() got an empty list; expected an optimiser, or a list of them"
        raise ConfigError(message)
    attachments: list[Attachment] = []
    try:
        attachments.extend(attached(one, Update(averager)) for one in optimizer)
    except BaseException:
        Attachment(None, attachments).remove()
        raise
    return Attachment(None, attachments)


def attached(optimizer: Optimizer, update: Update) -> Attachment:
    """Do what ``attach`` says with a hook that is given."""
    averager = update.averager
    if isinstance(optimizer, AttributeHints):
        message = (
            f"attach() got the {type_name(optimizer)} first and {shown(averager)} after it: are the arguments swapped? "
            "The optimiser comes first: polyak.attach(optimizer, averager)"
        )
        raise ArgumentError(message)
    optimizer = unwrapped(optimizer)
    if any(isinstance(hook, Update) and hook.averager is averager for hook in step_hooks(optimizer).values()):
        message = "this averager is attached to this optimiser already, and would be updated twice per step"
        raise ConfigError(message)
    _refuse_no_averager(averager)
    if hasattr(averager, "model"):
        _refuse_stranger(optimizer, averager.model)
    inner = inner_optimizer(optimizer)
    update.follow(optimizer)
    handles = update.registered(optimizer)
    if inner is not None:
        handles += _Inner(update).registered(inner)
    if isinstance(averager, Guarded) and inner is None:
        # An offloaded update may still be reading the weights that the optimiser is about to overwrite.
        handles.append(optimizer.register_step_pre_hook(lambda *_: averager.release()))
        attachment = Attachment(averager, handles)
        # An optimiser that is gone calls nothing any more.
        weakref.finalize(optimizer, attachment.remove).atexit = False
        return attachment
    return Attachment(None, handles)


class Update:
    """The hook behind a step.

    Attributes:
        averager: What it updates.
        within: Whether the optimiser's own ``step()`` is running; known only where it holds another optimiser.
    """

    def __init__(self, averager: _Updates) -> None:
        self.averager = averager
        self.within = False
        self._feeds: tuple[Sources, Source] | None = None
        self._number = -1
        self._looked = False

    def registered(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Register both hooks with an optimiser and return what takes them off."""
        handle = optimizer.register_step_post_hook(self)
        self._number = handle.id
        return [optimizer.register_step_pre_hook(self.before), handle]

    def follow(self, optimizer: Optimizer) -> None:
        """Tell the averager who updates it."""
        sources = getattr(self.averager, "sources", None)
        if isinstance(sources, Sources):
            kind = type(optimizer)
            ours = "polyak.optim." if kind.__module__.startswith("polyak.") else ""
            self._feeds = sources, sources.attach(optimizer, f"{ours}{kind.__name__}")

    @property
    def alone(self) -> bool:
        """Whether no other optimiser makes updates together with this one."""
        return self._feeds is None or self._feeds[0].alone(self._feeds[1])

    def order(self, optimizer: Optimizer) -> None:
        """Run behind all other hooks of the step: they may change weights."""
        run_last(optimizer, self._number, Update)

    def note(self) -> None:
        """Note an update that the step itself has made."""
        if self._feeds is not None:
            sources, source = self._feeds
            sources.note(source)

    def before(self, optimizer: Optimizer, *_: object) -> None:
        """Refuse a step that would change the average in the place of the weights.

        Raises:
            AppliedError: If the model holds the average now.
            ConfigError: If another optimiser steps by this one for a part of the ranks.
        """
        if not self._looked:
            refuse_shard(optimizer)
            self._looked = True
        averagers = self.averager.values() if isinstance(self.averager, Mapping) else [self.averager]
        if any(getattr(averager, "is_applied", False) for averager in averagers) and not makes_state(optimizer):
            message = (
                "optimizer.step() while the model holds the average would change the average; leave applied() first"
            )
            raise AppliedError(message)
        self.order(optimizer)
        if self._feeds is not None and self._feeds[0].overdue(self._feeds[1]):
            self._update(self._feeds[0].lr)
        self.within = True

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401, ARG002 - torch's signature
        """Update the averager, unless the step was skipped or other optimisers have yet to step."""
        self.within = False
        if makes_state(optimizer):
            return
        # A GradScaler calls fused optimisers for a skipped step, too; this attribute says which one it is.
        overflow = getattr(optimizer, "found_inf", None)
        moved = overflow is None or not bool(overflow)
        lr = optimizer.param_groups[0].get("lr")
        lr = None if lr is None else float(lr)
        if self._feeds is None:
            if moved:
                self.averager.update(lr=lr)
        elif self._feeds[0].stepped(self._feeds[1], lr, moved=moved):
            self._update(self._feeds[0].lr)

    def _update(self, lr: float | None) -> None:
        with nullcontext() if self._feeds is None else self._feeds[0].updating():
            self.averager.update(lr=lr)
        self.note()


class _Inner(Update):
    """The hook behind a step of the optimiser that another one holds: where the other's ``step()`` does not run."""

    def __init__(self, outer: Update) -> None:
        super().__init__(outer.averager)
        self._outer, self._looked = outer, True

    @override
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._outer.within:
            self._outer(optimizer, args, kwargs)


def _refuse_no_averager(averager: object) -> None:
    # Dictionaries and the averages of other libraries have an `update` too, which takes no learning rate.
    try:
        fits = "lr" in inspect.signature(averager.update).parameters  # type: ignore[attr-defined]  # answered below
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:
        message = f"got {type_name(averager)} as the averager; expected what polyak.average() returns"
        raise ConfigError(message)


def _refuse_stranger(optimizer: Optimizer, model: Model | None) -> None:
    if model is None:
        message = "the averager has no model (it was unpickled); build one for the model, load its state, attach that"
        raise UnboundError(message)
    own = {identity(slot.tensor) for entry in walk(model) for slot in entry.locations}
    trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if own.isdisjoint(map(identity, trained)):
        message = (
            f"none of the optimiser's {len(trained)} tensors belongs to the averager's model; attach the averager of "
            "the model that this optimiser trains. Where an optimiser steps copies of the weights (DeepSpeed, apex), "
            "call averager.update() yourself after each real step."
        )
        raise MismatchError(message)
