"""A module that computes with the average: the model's structure around other tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from polyak.errors import ModelError
from polyak.tensors.entries import identity, modules_of, walk
from polyak.tensors.wrappers import unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polyak.tensors.plan import Plan

__all__ = ["Replica"]

_CONTAINERS = (list, tuple, set, dict, OrderedDict)


class Replica:
    """The eval-mode module of an averager.

    Its parameters are its own; they share the memory of the tensors that hold the average now, or copy their values
    where the average is stored on another device or in another dtype than the model's.

    Args:
        plan: The plan of the averager's own model.
        refresh: Called before each forward and each ``state_dict()`` of the module; it calls ``follow``.
    """

    def __init__(self, plan: Plan, refresh: Callable[[], None]) -> None:
        self.moment: object = None
        with torch.inference_mode(mode=False), torch.no_grad():
            self.module, self._tensors = _rebuilt(plan)
        self._plan, self._made_for = ref(plan), _signature(plan)
        self.module.eval()
        # TorchScript takes no hooks: such a module is brought up to date only where the averager is asked for it.
        if not isinstance(self.module, torch.jit.ScriptModule):
            self.module.register_forward_pre_hook(_KeepInStep(refresh))
            self.module.register_state_dict_pre_hook(_KeepInStep(refresh))  # type: ignore[no-untyped-call]  # torch's own

    def fits(self, plan: Plan) -> bool:
        """Return whether the model still has the modules, tensors, dtypes and devices this was made for."""
        if self._plan() is not plan:
            if self._made_for != _signature(plan):
                return False
            self._plan = ref(plan)
        return True

    def follow(self, averages: Mapping[str, Tensor], moment: object) -> None:
        """Compute with these tensors from now on.

        Args:
            averages: The tensor that holds the average now, by name.
            moment: What ``self.moment`` is from now on.
        """
        if not self._tensors.keys() <= averages.keys():
            return  # tensors were tied since: another module is made where the averager is asked for it
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, tensors in self._tensors.items():
                average = averages[name]
                for tensor in tensors:
                    if (tensor.dtype, tensor.device) == (average.dtype, average.device):
                        tensor.data = average.data
                    else:
                        tensor.data.copy_(average)
        self.moment = moment


def _signature(plan: Plan) -> tuple[object, ...]:
    model = cast("nn.Module", plan.model)
    averaged = {identity(entry.tensor) for entry in plan.entries}
    shared = tuple(memory for entry in walk(model) if (memory := identity(entry.tensor)) not in averaged)
    layouts = ((s.aliases, t.dtype, t.device) for s, t in zip(plan.stored, plan.live, strict=True))
    return tuple(model.modules()), shared, *layouts


class _KeepInStep:
    """The hook that refreshes a module before it is used; a pickled or copied module stands for itself."""

    def __init__(self, refresh: Callable[[], None] = lambda: None) -> None:
        self._refresh = refresh

    def __call__(self, *_: object) -> None:
        # What compiles or exports the module must not trace the averager too; shared memory is in step by itself.
        if not torch.compiler.is_compiling():
            self._refresh()

    def __reduce__(self) -> tuple[type[_KeepInStep], tuple[()]]:
        return _KeepInStep, ()


def _rebuilt(plan: Plan) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    model = plan.model
    if not isinstance(model, nn.Module):
        message = "a mapping of tensors has no forward; use averaged_state_dict(), or average the module itself"
        raise ModelError(message)
    if any(entry.spread for entry in plan.entries):
        message = (
            f"{type(model).__name__} is sharded over ranks, and its layers gather what FSDP2 keeps, not a copy's "
            "tensors; compute with applied(), which swaps the shards in"
        )
        raise ModelError(message)
    own: dict[int, Any] = {id(slot.tensor): slot.tensor for entry in walk(model) for slot in entry.slots}
    for entry, live, stored in zip(plan.entries, plan.live, plan.stored, strict=True):
        blank = _blank(entry.tensor, live, stored.average)
        own.update({id(slot.tensor): blank for slot in entry.slots})
    for prefix, part in modules_of(model):
        # torch.compile(model.forward) and lambdas: bound to the model, and copied by nobody.
        if isinstance(vars(part).get("forward"), FunctionType):
            where = prefix.rstrip(".") or type(model).__name__
            message = (
                f"{where} has a function as its own `forward`, which no copy can have; compute with applied() instead"
            )
            raise ModelError(message)
    module = _copied(model, own)
    found = {slot.name: slot.tensor for entry in walk(module) for slot in entry.slots}
    tensors = {}
    for entry, stored in zip(plan.entries, plan.stored, strict=True):
        live_ids = {id(slot.tensor) for slot in entry.slots}
        names = [slot.name for slot in entry.slots]
        if missing := [name for name in names if name not in found or id(found[name]) in live_ids]:
            message = (
                f"the copy of {type(model).__name__} has no {missing[0]} of its own; compute with applied() instead"
            )
            raise ModelError(message)
        own_tensors = {id(found[name]): found[name] for name in names}.values()
        tensors[stored.name] = [tensor.requires_grad_(False) for tensor in own_tensors]  # noqa: FBT003 - torch types it so
    return module, tensors


def _blank(tensor: Tensor, live: Tensor, average: Tensor) -> Tensor:
    # What is stored as the model needs it is shared, not copied.
    alike = (live.dtype, live.device) == (average.dtype, average.device)
    blank = average.detach() if alike else torch.empty_like(live.detach())
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank


def _copied(model: nn.Module, own: dict[int, Any]) -> nn.Module:
    """Copy a module around given tensors: deeply where it can be, else its modules only."""
    memo = dict(own)
    for module in model.modules():
        for value in vars(module).values():
            # The old weight_norm keeps a computed weight, which deepcopy refuses; it is computed anew in each forward.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001 - whatever a model's parts raise (locks, generators, their own refusal)
        return _Rebuilder(own).module(model)


class _Rebuilder:
    """Copies modules and what refers to them; shares everything else with the model."""

    def __init__(self, own: dict[int, Any]) -> None:
        self._done = dict(own)

    def module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            message = f"{type(module).__name__} is compiled by TorchScript and cannot be rebuilt; use applied()"
            raise ModelError(message)
        # A compiled or checkpointing wrapper is bound to what it wraps; for evaluation that is enough.
        inner = unwrap(module)
        new: nn.Module = type(inner).__new__(type(inner))
        self._done[id(module)] = self._done[id(inner)] = new
        new.__dict__.update({key: self._value(value) for key, value in vars(inner).items()})
        new.__dict__["_compiled_call_impl"] = None  # of module.compile(): bound to the original
        return new

    def _value(self, value: Any) -> Any:  # noqa: ANN401 - whatever an attribute may be
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self._value(value.__self__))
        if isinstance(value, partial):
            return partial(self._value(value.func), *map(self._value, value.args), **self._value(value.keywords))
        if type(value) in _CONTAINERS:
            items = value.items() if isinstance(value, dict) else value
            return type(value)([self._value(item) for item in items])
        return value
