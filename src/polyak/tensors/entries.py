"""Walk a model once: each distinct tensor with its canonical name, kind, aliases and places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from polyak.errors import ModelError
from polyak.errors.formatting import type_name
from polyak.tensors.wrappers import is_sparsity, unwrap

if TYPE_CHECKING:
    from polyak.tensors.sharding.placement import Spread

__all__ = [
    "PLAIN",
    "STRIDED",
    "Entry",
    "Given",
    "Kind",
    "Location",
    "Model",
    "address",
    "addressed",
    "as_model",
    "identity",
    "modules_of",
    "vacant",
    "walk",
]

Kind = Literal["parameter", "buffer"]
Given = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""What users give as a model."""
Model = nn.Module | Mapping[str, Tensor]

PLAIN = frozenset({Tensor, nn.Parameter})
STRIDED = torch.strided
_NONE: frozenset[str] = frozenset()
_VECTORS = frozenset({"_u", "_v"})
_MASK = frozenset({"mask"})


class Location(NamedTuple):
    """A place that holds a tensor: ``owner`` is a module, or the mapping that is the model."""

    owner: nn.Module | Mapping[str, Tensor]
    key: str
    name: str
    tensor: Tensor


class Entry(NamedTuple):
    """One distinct tensor of a model.

    Attributes:
        name: The canonical name: the first one in the walk, without any wrapper's prefix.
        kind: ``"parameter"`` or ``"buffer"``.
        tensor: The live tensor itself.
        locations: All places that hold it, in the order of the walk; more than one where it is tied.
        aliases: All canonical names of the tensor, ``name`` first.
        persistent: Whether it is part of ``model.state_dict()``.
        verbatim: Whether only its exact values mean anything: spectral norm's vectors have unit norm, pruning masks
            are 0 or 1.
        spread: How the whole is spread over ranks, where ``tensor`` is this rank's part of it; else None.
    """

    name: str
    kind: Kind
    tensor: Tensor
    locations: tuple[Location, ...]
    aliases: tuple[str, ...]
    persistent: bool = True
    verbatim: bool = False
    spread: Spread | None = None

    def __eq__(self, other: object) -> bool:
        return self is other  # tensors have no truth value

    def __hash__(self) -> int:
        return id(self)


def as_model(given: Given) -> Model:
    """Return a model: tensors that were given in order, such as ``model.parameters()``, are named by their numbers."""
    if isinstance(given, (nn.Module, Mapping, str, type, Tensor)) or not isinstance(given, Iterable):
        return given  # type: ignore[return-value]  # what is no model is refused by the walk
    tensors = [*given]
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def walk(model: Model) -> list[Entry]:
    """Return each distinct tensor of a model once, with all its names.

    Parameters and buffers, non-persistent ones included, in the order of ``model.state_dict()``. Wrappers
    (DataParallel, DDP, ``torch.compile``, activation checkpointing, FSDP) change no name. Two names are one
    entry where they hold the same tensor object or exactly the same memory.

    Args:
        model: A module, or a mapping of names to tensors (then floating tensors are parameters, others buffers).

    Raises:
        ModelError: If ``model`` is neither a module nor a mapping of names to tensors.

    Often confused with: ``model.state_dict()``, which lists a tied tensor once per name, leaves out
    non-persistent buffers, keeps the prefixes of wrappers and costs milliseconds on large models.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))
        >>> [(entry.name, entry.kind) for entry in walk(model)][:3]
        [('0.weight', 'parameter'), ('1.weight', 'parameter'), ('1.bias', 'parameter')]
    """
    found = [*_tensors_of(model)]
    where = [address(entry.tensor) for entry in found]
    if len({*where}) == len(where):
        return found
    often = Counter(where)
    groups: dict[object, list[Entry]] = {}
    for entry, place in zip(found, where, strict=True):
        # Tensors that begin in the same place may still be different views of it.
        groups.setdefault(place if often[place] == 1 else identity(entry.tensor), []).append(entry)
    return [_joined(group) for group in groups.values()]


def _joined(found: Sequence[Entry]) -> Entry:
    """Return one entry for all places of a tensor."""
    first = found[0]
    if len(found) == 1:
        return first
    locations, names = tuple([entry.locations[0] for entry in found]), tuple([entry.name for entry in found])
    return first._replace(locations=locations, aliases=names, persistent=any(entry.persistent for entry in found))


def _tensors_of(model: Model) -> Iterator[Entry]:
    """Yield an entry for each place of a tensor."""
    if isinstance(model, nn.Module):
        for prefix, module in modules_of(model):
            yield from _own_tensors(prefix, module)
        return
    if not isinstance(model, Mapping):
        got = f"the class {model.__name__}" if isinstance(model, type) else type_name(model)
        message = f"a model is a torch.nn.Module, a mapping of names to tensors, or tensors in order; got {got}"
        raise ModelError(message)
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor):
            message = f"what is given as a model holds tensors; got {type_name(tensor)} at {name!r}"
            raise ModelError(message)
        kind: Kind = "parameter" if tensor.is_floating_point() or tensor.is_complex() else "buffer"
        yield Entry(name, kind, tensor, (Location(model, name, name, tensor),), (name,))


def modules_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield each module under each of its canonical prefixes, without wrappers."""
    module = unwrap(model)
    yield prefix, module
    for key, child in module._modules.items():  # noqa: SLF001 - named_modules() hides shared modules' other names
        if child is not None:
            yield from modules_of(child, f"{prefix}{key}.")


def vacant(model: Model) -> dict[str, bool]:
    """Return the buffers that a model has registered and not filled, and whether each is persistent."""
    found = {}
    for prefix, module in modules_of(model) if isinstance(model, nn.Module) else ():
        transient = module._non_persistent_buffers_set  # noqa: SLF001 - as below
        found.update({prefix + key: key not in transient for key, b in module._buffers.items() if b is None})  # noqa: SLF001 - as below
    return found


def _own_tensors(prefix: str, module: nn.Module) -> Iterator[Entry]:
    # named_parameters() hides a tensor's other names; the dictionaries are what it reads.
    for key, parameter in module._parameters.items():  # noqa: SLF001
        if parameter is not None:
            name = prefix + key
            yield Entry(name, "parameter", parameter, (Location(module, key, name, parameter),), (name,))
    buffers = module._buffers  # noqa: SLF001 - as above
    if not buffers:
        return
    verbatim, transient = _verbatim_keys(module), module._non_persistent_buffers_set  # noqa: SLF001 - torch has no public way to ask
    for key, buffer in buffers.items():
        if buffer is not None:
            name, location = prefix + key, Location(module, key, prefix + key, buffer)
            yield Entry(name, "buffer", buffer, (location,), (name,), key not in transient, key in verbatim)


def _verbatim_keys(module: nn.Module) -> frozenset[str]:
    if isinstance(module, nn.utils.parametrizations._SpectralNorm):  # noqa: SLF001 - torch exports no name for it
        return _VECTORS
    if is_sparsity(module):
        return _MASK
    hooks = module._forward_pre_hooks  # noqa: SLF001 - the old spectral_norm and pruning are known by their hooks only
    if not hooks:
        return _NONE
    norms = [hook.name for hook in hooks.values() if isinstance(hook, SpectralNorm)]
    pruned = [hook._tensor_name for hook in hooks.values() if isinstance(hook, BasePruningMethod)]  # noqa: SLF001 - torch keeps it there only
    return frozenset([f"{name}_{vector}" for name in norms for vector in "uv"] + [f"{name}_mask" for name in pruned])


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins, or else its id: no subclass, lazy, meta or freed tensor has any."""
    if type(tensor) in PLAIN and tensor.layout is STRIDED:
        return tensor.data_ptr() or id(tensor)
    return id(tensor)


def addressed(tensor: Tensor) -> bool:
    """Return whether a tensor has memory that can be compared."""
    return tensor.numel() > 0 and address(tensor) != id(tensor)


def identity(tensor: Tensor) -> object:
    """Return a key that identifies a tensor's object or memory."""
    # Two Parameter objects over exactly the same memory (`head.weight.data = emb.weight.data`) are one tensor.
    if not addressed(tensor):
        return id(tensor)
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
