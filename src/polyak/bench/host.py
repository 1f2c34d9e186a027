"""Switch off what moves tensors, so that only the host's work before the kernels is left to be timed."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from polyak.kernels import threads
from polyak.kernels.cuda import fused as cuda
from polyak.kernels.eager import foreach, holding, operations

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_kernels"]

_FOREACH = ("lerp_", "mul_", "add_", "sub_", "sub", "copy_", "addcdiv_")


@contextmanager
def without_kernels() -> Iterator[None]:
    """Replace the functions of torch that move lists of tensors, and polyak's kernels, by ones that do nothing.

    Tensors that a library moves one by one, as timm does with integer buffers, are still moved.
    """
    public = getattr(torch, "foreach", None)  # torch 2.15 made these public; older versions have only the private names
    theirs = [(torch, f"_foreach_{name}") for name in _FOREACH] + [(public, name) for name in _FOREACH]
    ours = [
        (torch, "cat"),
        (operations, "_foreach_lerp_"),
        (operations, "_foreach_copy_"),
        (foreach, "longest"),
        (holding, "needless"),
        (holding.Bound, "holds"),
        (holding.Bound, "moved"),
        (threads.Slices, "run"),
        (cuda.FusedCUDA, "_launch"),
    ]
    with ExitStack() as switched_off:
        for owner, name in (*(pair for pair in theirs if hasattr(*pair)), *ours):
            switched_off.enter_context(_idle(owner, name))
        yield


@contextmanager
def _idle(owner: object, name: str) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, _first)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _first(*arguments: Any, **_: Any) -> Any:  # noqa: ANN401 - stands for functions of many kinds
    """Return the first argument, as the functions do that this stands for."""
    return arguments[0]
