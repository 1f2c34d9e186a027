"""The hook of an averager's module that brings it up to date; it does not go with copies, pickles and scripts."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["RootHooks", "undisturbed"]


class RootHooks(OrderedDict[int, Any]):
    """The forward pre-hooks of a module with one more that only its own forward sees: copies and scripts have none."""

    def __init__(self, hooks: Mapping[int, Any], look: Callable[[], Callable[[], None] | None]) -> None:
        super().__init__(hooks)
        self.look = look
        self.paused = False

    def __bool__(self) -> bool:
        return True

    @override
    def items(self) -> Any:
        return ((-1, self._before), *super().items())

    def _before(self, module: nn.Module, _: object) -> None:
        # What compiles, exports or traces the module must not see the averager too.
        if self.paused or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch's own
            return
        if (look := self.look()) is not None and not getattr(module, "_is_replica", False):  # nn.DataParallel's
            look()

    @override
    def __reduce__(self) -> tuple[type[OrderedDict[int, Any]], tuple[list[tuple[int, Any]]]]:
        return OrderedDict, ([*super().items()],)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Let the forwards of an averager's module leave its tensors as they are."""
    hooks = module._forward_pre_hooks  # noqa: SLF001 - torch has no public way to ask
    if not isinstance(hooks, RootHooks):
        yield
        return
    hooks.paused = True
    try:
        yield
    finally:
        hooks.paused = False
