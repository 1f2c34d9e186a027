"""Copies of a model's modules around other tensors, which share what is neither module nor tensor nor container."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from functools import partial
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from polyak.errors import ModelError
from polyak.tensors.entries import modules_of
from polyak.tensors.wrappers import unwrap

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CONTAINERS", "INTERNAL", "Copier", "contents", "copied", "foreign_hooks"]

INTERNAL = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
"""The attributes in which ``torch.nn.Module`` keeps tensors, modules, hooks and the mode."""

CONTAINERS = (list, tuple, set, dict, OrderedDict)
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
_ATOMS = (
    *(int, float, complex, bool, str, bytes, type(None), type, range),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    *(FunctionType, BuiltinFunctionType, ModuleType),
)
_COPIED = (*_ATOMS, torch.ScriptObject, torch._C.ScriptModule)  # noqa: SLF001 - the class of what a scripted module wraps
_OPAQUE = (type, ModuleType, FunctionType, Optimizer, LRScheduler)
_VISITED = 10_000  # objects looked at to find out whether one refers to the model
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def copied(model: nn.Module, own: dict[int, Any]) -> nn.Module:
    """Copy a module around given tensors: by ``deepcopy`` where possible, else module by module.

    Args:
        model: The model.
        own: What stands in the copy for each tensor, by the ``id`` of the tensor.
    """
    memo = {**own, **_kept(model, own)}
    try:
        module = copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001 - whatever a model's parts raise (locks, generators, their own refusal)
        module = Copier(model, own).module(model)
    both = [(theirs, ours) for (_, theirs), (_, ours) in zip(modules_of(model), modules_of(module), strict=True)]
    copier = Copier(model, {**own, **{id(theirs): ours for theirs, ours in both}})
    for theirs, ours in both:
        _own_class(ours)
        for kind in _HOOKS:
            for number in [n for n, hook in getattr(theirs, kind).items() if _foreign(hook, model)]:
                getattr(ours, kind).pop(number, None)
        for key, value in vars(theirs).items():
            if isinstance(value, FunctionType) and key not in INTERNAL:
                vars(ours)[key] = copier.value(value)
    return module


def foreign_hooks(model: nn.Module) -> list[str]:
    """Return the forward hooks that a copy leaves out, as ``module: function``."""
    return [
        f"{prefix.rstrip('.') or type(part).__name__}: {getattr(hook, '__qualname__', type(hook).__name__)}"
        for prefix, part in modules_of(model)
        for kind in _HOOKS[:2]
        for hook in getattr(part, kind).values()
        if _foreign(hook, model)
    ]


def contents(value: object) -> Iterator[object]:
    """Yield all that plain containers hold, nested ones included."""
    if type(value) is dict or type(value) is OrderedDict:
        yield from value
        yield from contents([*value.values()])
    elif type(value) in CONTAINERS and _flat(value):
        yield from value  # type: ignore[misc]  # one of the containers
    elif type(value) in CONTAINERS:
        for item in value:  # type: ignore[attr-defined]  # one of the containers
            yield from contents(item)
    else:
        yield value


def _flat(container: Any) -> bool:  # noqa: ANN401 - one of the containers
    """Return whether a container holds numbers and texts only; a model may note one for each step, for ever."""
    return _PLAIN.issuperset(map(type, container))


def _foreign(hook: object, model: nn.Module) -> bool:
    """Return whether a hook is a function that neither torch nor the model's own classes made."""
    while isinstance(hook, partial):
        hook = hook.func
    if isinstance(hook, MethodType):
        return not any(hook.__self__ is module for module in model.modules())
    if not isinstance(hook, FunctionType):
        return False  # an object that computes, as those of weight_norm() and prune()
    if hook.__module__.split(".")[0] == "torch":
        return False
    makers = {(c.__module__, c.__qualname__) for _, part in modules_of(model) for c in type(part).__mro__}
    return not any(hook.__module__ == m and hook.__qualname__.startswith(f"{name}.") for m, name in makers)


def _kept(model: nn.Module, own: dict[int, Any]) -> dict[int, Any]:
    """Return the memo of a deep copy: objects shared with the model, and substitutes for tensors with a history."""
    theirs = {id(module) for module in model.modules()} | own.keys()
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
                continue
            hooks = chain.from_iterable(hook.values() for hook in (value,) if key in _HOOKS)
            memo.update({id(hook): hook for hook in hooks if _foreign(hook, model)})
            for item in contents(value) if key not in INTERNAL else ():
                if isinstance(item, Tensor):
                    memo.setdefault(id(item), item.detach() if not item.is_leaf else item)
                elif not (isinstance(item, _COPIED) or id(item) in theirs or _refers(item, theirs)):
                    memo[id(item)] = item
    return {key: value for key, value in memo.items() if key not in theirs}


def _refers(value: object, theirs: set[int]) -> bool:
    """Return whether modules or tensors of the model can be reached from an object."""
    if isinstance(value, _OPAQUE):
        return False
    seen, waiting = {id(value)}, [value]
    while waiting and len(seen) < _VISITED:
        for found in gc.get_referents(waiting.pop()):
            if id(found) in theirs:
                return True
            if id(found) not in seen and not isinstance(found, _OPAQUE):
                seen.add(id(found))
                waiting.append(found)
    return False


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own: removing a parametrisation changes the class."""
    if nn.utils.parametrize.is_parametrized(module):
        kind = type(module)
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))


class Copier:
    """Copies the modules of a model and what refers to them.

    Args:
        model: The model.
        done: What stands for an object, by the ``id`` of the object.
    """

    def __init__(self, model: nn.Module, done: dict[int, Any]) -> None:
        self._parts, self._done = {id(module) for module in model.modules()}, dict(done)

    def module(self, module: nn.Module) -> nn.Module:
        """Return a copy of a module with all that it contains."""
        if isinstance(module, torch.jit.ScriptModule):
            message = f"{type(module).__name__} is compiled by TorchScript and cannot be rebuilt; use applied()"
            raise ModelError(message)
        # A compiled or checkpointing wrapper is bound to what it wraps; for evaluation that is enough.
        inner = unwrap(module)
        new: nn.Module = type(inner).__new__(type(inner))
        self._done[id(module)] = self._done[id(inner)] = new
        new.__dict__.update({key: self.attribute(value) for key, value in vars(inner).items()})
        new.__dict__["_compiled_call_impl"] = None  # of module.compile(): bound to the original
        return new

    def attribute(self, value: Any) -> Any:  # noqa: ANN401 - whatever an attribute may be
        """Return the copy's attribute: a tensor is copied, which a container shares."""
        if isinstance(value, Tensor) and id(value) not in self._done:
            return value.detach().clone()
        return self.value(value)

    def value(self, value: Any) -> Any:  # noqa: ANN401, PLR0911 - whatever an attribute may hold, one kind per line
        """Return the copy of an object, or the object itself if it is shared."""
        if id(value) in self._done:
            return self._done[id(value)]
        if id(value) in self._parts:
            return self.module(value)
        if isinstance(value, Tensor):
            return value if value.is_leaf else value.detach()
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.value(value.__self__))
        if isinstance(value, partial):
            return partial(self.value(value.func), *map(self.value, value.args), **self.value(value.keywords))
        if isinstance(value, FunctionType) and value.__closure__:
            return self._function(value)
        if type(value) is ReferenceType:
            return value if (to := value()) is None or id(to) not in self._done else ref(self._done[id(to)])
        return self._container(value) if type(value) in CONTAINERS else value

    def _container(self, value: Any) -> Any:  # noqa: ANN401 - one of the containers
        if _flat(value.values() if isinstance(value, dict) else value):
            return type(value)(value)
        if isinstance(value, dict):
            return type(value)([(key, self.value(item)) for key, item in value.items()])
        return type(value)([self.value(item) for item in value])

    def _function(self, function: FunctionType) -> FunctionType:
        """Return a function whose closure holds the copy where the original's holds the model."""
        held = [_content(cell) for cell in function.__closure__ or ()]
        ours = [self.value(content) if self._stands(content) else content for content in held]
        if all(map(is_, held, ours)):
            return function
        closure = tuple(map(CellType, ours))
        new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
        new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        return new

    def _stands(self, content: object) -> bool:
        return id(content) in self._done or isinstance(content, MethodType)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
