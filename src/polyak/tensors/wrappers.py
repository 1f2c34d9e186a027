"""Which modules only wrap another one, known by what they are and never by a name.

A user's own submodule called ``module`` or ``_orig_mod`` is not a wrapper.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from polyak.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

__all__ = [
    "dtensor",
    "each_module",
    "is_sparsity",
    "plain_name",
    "refuse_sharded",
    "root_of",
    "shards",
    "spellings",
    "unwrap",
]

_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
_FSDP2 = ("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")

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
_PREFIXES = frozenset(attribute for *_, attribute in _WRAPPERS)
_OWN_PREFIX = "module"  # the one that users give modules of their own, too
_SPARSITY = ("torch.ao.pruning.sparsifier.utils", "FakeSparsity")


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


def root_of(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, or the outermost one that FSDP2 shards."""
    while not shards(module) and (attribute := _wraps_in(cast("Any", type(module)))):
        module = getattr(module, attribute)
    return module


def broadcasters(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the wrappers around a model that overwrite its buffers with rank 0's in each forward: DDP."""
    kind = _loaded("torch.nn.parallel.distributed", "DistributedDataParallel")
    while attribute := _wraps_in(cast("Any", type(module))):
        if kind is not None and isinstance(module, kind):
            yield module
        module = getattr(module, attribute)


@contextmanager
def buffers_kept(wrappers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep each rank's buffers as they are while these wrappers of DDP compute."""
    quiet: list[Any] = [wrapper for wrapper in wrappers if getattr(wrapper, "broadcast_buffers", False)]
    try:
        for wrapper in quiet:
            wrapper.broadcast_buffers = False
        yield
    finally:
        for wrapper in quiet:
            wrapper.broadcast_buffers = True


def plain_name(model: nn.Module, name: str) -> str:
    """Return the name of something in a model without the prefixes of its wrappers, at whatever depth they are.

    Some wrappers take their prefix out of state dicts themselves.
    """
    kept: list[str] = []
    place: nn.Module | None = model
    for part in name.split("."):
        while place is not None and (attribute := _wraps_in(cast("Any", type(place)))):
            place = getattr(place, attribute)
            if part == attribute:
                break
        else:
            kept.append(part)
            place = None if place is None else place._modules.get(part)  # noqa: SLF001 - get_submodule() raises
    return ".".join(kept)


def spellings(name: str) -> Iterator[str]:
    """Yield the names that a name from a wrapped model may stand for: itself first, then without wrappers' prefixes.

    Examples:
        >>> [*spellings("module._orig_mod.head.weight")]
        ['module._orig_mod.head.weight', 'module.head.weight', 'head.weight', 'head.weight']
    """
    parts = name.split(".")
    yield name
    if _PREFIXES.isdisjoint(parts):
        return
    # No user calls a submodule `_orig_mod`, and some call theirs `module`.
    yield ".".join(parts := [part for part in parts if part == _OWN_PREFIX or part not in _PREFIXES])
    while parts and parts[0] == _OWN_PREFIX:
        yield ".".join(parts := parts[1:])
    yield ".".join(part for part in parts if part != _OWN_PREFIX)


def dtensor() -> Any:  # noqa: ANN401 - a class or None
    """Return the class of sharded tensors; None while it is not imported."""
    return _loaded("torch.distributed.tensor", "DTensor")


def shards(module: nn.Module) -> bool:
    """Return whether FSDP2 (``fully_shard``) shards a module."""
    return _shards(cast("Any", type(module)))


@lru_cache(maxsize=4096)
def _shards(kind: type) -> bool:
    found = _loaded(*_FSDP2)
    return found is not None and issubclass(kind, found)


def is_sparsity(module: nn.Module) -> bool:
    """Return whether a module is the parametrization by which ``torch.ao.pruning`` multiplies a mask into a weight."""
    kind = _loaded(*_SPARSITY)
    return kind is not None and isinstance(module, kind)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose engine does not show its values, or does not see what is written into them.

    Raises:
        ModelError: If ``model`` has FSDP1 layers that shard or hide their parameters, or belongs to DeepSpeed's ZeRO.
    """
    fsdp1 = _loaded(*_FSDP1)
    zero = "deepspeed" in sys.modules
    for module in each_module(model) if fsdp1 or zero else ():
        if fsdp1 and isinstance(module, fsdp1) and (module.process_group.size() > 1 or not module._use_orig_params):  # noqa: SLF001 - FSDP1 has no public way to ask
            message = (
                "the model is wrapped in FSDP1 (FullyShardedDataParallel) over several ranks or with "
                "use_orig_params=False, whose forward does not see values written into its parameters; "
                "on one rank use use_orig_params=True, otherwise fully_shard() (FSDP2) or DDP"
            )
            raise ModelError(message)
        if zero:
            _refuse_zero(module)


def _refuse_zero(module: nn.Module) -> None:
    if callable(getattr(module, "zero_optimization_stage", None)):
        message = (
            f"got DeepSpeed's engine ({type(module).__name__}), whose optimiser keeps the weights that are trained to "
            "itself; the module's are rounded copies, and under ZeRO-3 not even there. Average with fully_shard() "
            "(FSDP2) or DDP; under ZeRO-1 and -2 the rounded weights are averaged where engine.module is given"
        )
        raise ModelError(message)
    own = module._parameters.values()  # noqa: SLF001 - parameters() builds every name
    if any(hasattr(parameter, "ds_status") for parameter in own):
        message = (
            f"{type(module).__name__} is partitioned by DeepSpeed's ZeRO-3, whose parameters are empty between steps; "
            "use ZeRO-1 or -2 and give engine.module, or train with fully_shard() (FSDP2)"
        )
        raise ModelError(message)


def each_module(model: nn.Module) -> Iterator[nn.Module]:
    """Yield each module, wrappers included, a shared one once per place."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]  # noqa: SLF001 - modules() builds every name
