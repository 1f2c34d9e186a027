"""Answers to attributes that averages of other libraries have, and an averager has not."""

from __future__ import annotations

from difflib import get_close_matches
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

from polyak.errors import ArgumentError, AttributeAccessError
from polyak.errors.formatting import shown

__all__ = ["AttributeHints"]

_LONGEST = 40  # letters of a name for which similar ones are looked up
_HABITS = {
    "update()": "step update_parameters update_average update_ema update_ema_parameters ema_update on_step_end",
    "applied()": "store restore swap swap_in swap_out swap_parameters apply_shadow average_parameters apply_ema "
    "ema_scope use_ema temporarily swap_parameters_with_ema",
    "copy_to()": "copy_to_ copy_params_from_ema_to_model copy_params_from_model_to_ema assign_to "
    "apply_to copy_parameters_to",
    "module": "ema ema_model averaged_model model_ema shadow_model teacher eval train forward predict get_model",
    "averages": "shadow shadow_params parameters named_parameters ema_params collected_params buffers slots ema_state",
    "averaged_state_dict()": "ema_state_dict model_state_dict get_averaged_state shadow_state_dict save_pretrained",
    "n": "n_averaged num_updates num_averaged updates count optimization_step step_count",
    "rate": "alpha momentum cur_decay_value current_decay get_current_decay get_decay",
    "strategy": "decay beta halflife window name avg_fn multi_avg_fn settings config",
    "polyak.save(averager, path)": "save save_state save_to dump",
    "polyak.load(averager, path)": "load load_state from_file from_pretrained",
    "averager.to(device=, dtype=)": "cuda cpu half float double device dtype",
    "polyak.recalibrate(averager, batches)": "update_bn update_batch_norm recalibrate",
    "polyak.attach(optimizer, averager)": "attach register register_hook hook",
}
_ANSWERS = {name: answer for answer, names in _HABITS.items() for name in names.split()}


class AttributeHints:
    """Names in an error what serves the purpose of an attribute that is not there.

    Functions of a subclass are called in errors as users know them: ``Averager.update()``.
    """

    _kind: ClassVar[str] = "averager"
    _public: ClassVar[str] = "Averager"
    _context: ClassVar[str] = "averager.applied()"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        members = {name: member for base in reversed(cls.__mro__) for name, member in vars(base).items()}
        for name, member in members.items():
            for function in (member, getattr(member, "__wrapped__", None)):
                if name.startswith("_") or not isinstance(function, FunctionType):
                    continue
                if function.__module__.startswith("polyak."):
                    function.__qualname__ = f"{cls._public}.{name}"

    if not TYPE_CHECKING:  # type checkers know the attributes

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - what a property returns
            if any(name in vars(base) for base in type(self).__mro__):
                return object.__getattribute__(self, name)  # a property that failed: raise its own error
            message = f"the {self._kind} has no attribute {shown(name)}.{self._hint(name)}"
            raise AttributeAccessError(message)

        def __enter__(self) -> None:
            message = f"the {self._kind} is no context itself; write: with {self._context}: ..."
            raise ArgumentError(message)

        def __exit__(self, *_: object) -> None:
            """Never come here; Python asks for it first."""

    def _hint(self, name: str) -> str:
        if name.startswith("_"):
            return ""
        if answer := _ANSWERS.get(name):
            return f" For that there is {answer if '(' in answer[1:-2] else f'{self._kind}.{answer}'}."
        own = [known for known in dir(type(self)) if not known.startswith("_")]
        near = get_close_matches(name, own, n=1, cutoff=0.7) if len(name) <= _LONGEST else []
        return f" Did you mean {near[0]!r}?" if near else ""
