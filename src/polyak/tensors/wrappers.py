"""Which modules only wrap another one, known by what they are and never by a name.

A user's own submodule called ``module`` or ``_orig_mod`` is no wrapper.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from polyak.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["refuse_sharded", "unwrap"]

_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")

# (where the class is defined, its name, the attribute that holds the wrapped module)
_WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    (*_FSDP1, "_fsdp_wrapped_module"),
)


def _loaded(defined_in: str, class_name: str) -> Any:  # noqa: ANN401 - a class or None
    return getattr(sys.modules.get(defined_in), class_name, None)


@lru_cache(maxsize=4096)
def _wraps_in(kind: type) -> str:
    """Return the attribute in which modules of a class hold the one they wrap; empty where they wrap none."""
    for defined_in, class_name, attribute in _WRAPPERS:
        # A class whose defining module was never imported has no subclasses: nothing is imported for the test.
        found = _loaded(defined_in, class_name)
        if found is not None and issubclass(kind, found):
            return attribute
    return ""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers: DataParallel, DDP, torch.compile, checkpointing, FSDP.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> unwrap(torch.nn.DataParallel(model)) is model
        True
    """
    # mypy takes classes of modules for not hashable.
    while attribute := _wraps_in(cast("Any", type(module))):
        module = getattr(module, attribute)
    return module


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose values are spread over ranks: a swap would be seen by some of its layers only.

    Raises:
        ModelError: It has DTensor parameters (FSDP2, tensor parallel), or FSDP1 layers that shard or hide theirs.
    """
    dtensor, fsdp = _loaded("torch.distributed.tensor", "DTensor"), _loaded(*_FSDP1)
    for module in _modules(model) if dtensor or fsdp else ():
        if dtensor and any(isinstance(parameter, dtensor) for parameter in module._parameters.values()):  # noqa: SLF001 - parameters() builds every name
            name = next(name for name, parameter in model.named_parameters() if isinstance(parameter, dtensor))
            message = f"{name} is a DTensor (FSDP2 or tensor parallel); sharded models cannot be averaged yet"
            raise ModelError(message)
        if fsdp and isinstance(module, fsdp) and (module.process_group.size() > 1 or not module._use_orig_params):  # noqa: SLF001 - FSDP1 has no public way to ask
            message = (
                "the model is wrapped in FSDP1 (FullyShardedDataParallel) over several ranks or with "
                "use_orig_params=False, whose forward does not see values written into its parameters; "
                "on one rank use use_orig_params=True, otherwise DDP"
            )
            raise ModelError(message)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]  # noqa: SLF001 - modules() builds every name
