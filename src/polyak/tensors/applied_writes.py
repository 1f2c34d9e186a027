"""What was done to a model's tensors while it held an average."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak.errors import AppliedError, PolyakWarning
from polyak.errors.calls import warn_user

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from polyak.engine.plan.plan import Plan
    from polyak.tensors.swap import Swap

__all__ = ["complain", "put_back"]

_SHOWN = 200  # characters


def put_back(swap: Swap, plan: Plan) -> None:
    """Put the tensors of an undone swap back where a model holds others since, and note it in the swap."""
    for number, entry in enumerate(plan.entries):
        for location in entry.locations if entry.spread is None else ():
            for place in _places(location.owner):
                other = place[location.key] if location.key in place else None  # noqa: SIM401 - TorchScript's have no get()
                if isinstance(other, Tensor) and other is not location.tensor:
                    form = (other.shape, other.dtype) == (location.tensor.shape, location.tensor.dtype)
                    if entry.kind == "parameter":
                        (swap.written if form else swap.repacked).add(number)
                    place[location.key] = location.tensor


def complain(swap: Swap, plan: Plan, *, failed: bool) -> None:
    """Refuse layers that put other tensors in the place of their weights, and warn of written parameters.

    Args:
        swap: What was undone.
        plan: What it exchanged.
        failed: Whether an exception is under way, which is not replaced.

    Raises:
        AppliedError: If tensors had another shape or dtype inside.
    """
    if swap.repacked and not failed:
        message = (
            f"applied(): tensors of the model got another shape or dtype inside ({_names(plan, swap.repacked)}). "
            "The original weights are restored, which such layers may not expect; evaluate a copy instead: "
            "averager.copy_to(copy)."
        )
        raise AppliedError(message)
    written = [number for number in swap.written if plan.entries[number].kind == "parameter"]
    if written:
        message = (
            f"applied(): parameters were written inside ({_names(plan, written)}). The original weights are restored, "
            "and those writes are lost, or have changed the average; step optimisers and load checkpoints outside."
        )
        with suppress(PolyakWarning) if failed else nullcontext():  # where warnings are errors
            warn_user(message)


def _places(owner: nn.Module | Mapping[str, Tensor]) -> Iterator[MutableMapping[str, Any]]:
    if isinstance(owner, nn.Module):
        yield owner._parameters  # noqa: SLF001 - setattr() would register another tensor
        yield owner._buffers  # noqa: SLF001 - as above
    elif isinstance(owner, MutableMapping):
        yield owner


def _names(plan: Plan, numbers: Iterable[int]) -> str:
    return ", ".join(plan.entries[number].name for number in sorted(numbers))[:_SHOWN]
