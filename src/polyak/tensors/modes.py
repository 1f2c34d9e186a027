"""The mode in which averages are written."""

from __future__ import annotations

import torch
from typing_extensions import override

__all__ = ["Untracked"]

_C = torch._C  # noqa: SLF001 - torch.inference_mode() and torch.no_grad() stand on these


class Untracked(_C._InferenceMode):  # noqa: SLF001 - as above
    """A context without autograd and outside of inference mode, where normal tensors keep their version counters.

    Torch's guard in C++ restores both modes, at the latest when it is freed: Ctrl-C on the way out finds no line of
    Python before that.
    """

    def __init__(self) -> None:
        super().__init__(False)  # noqa: FBT003 - torch's own, of one argument

    @override
    def __enter__(self) -> None:
        try:
            super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
            _C._set_grad_enabled(False)  # noqa: FBT003, SLF001 - torch's own, of one argument
        except BaseException:  # the frames of a traceback would keep the guard
            self.__exit__(None, None, None)
            raise
