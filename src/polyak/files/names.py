"""Names of tensors: what wrappers add to them, and what is near to them."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

__all__ = ["near", "number_in", "step_around", "without_wrappers"]

T = TypeVar("T")

_ANYWHERE = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = "module."
_COUNTERS = {"n_averaged"}  # what AveragedModel keeps next to its module
_NUMBER = re.compile(r"\d+")
_FRACTION = re.compile(r"\d+(?:\.\d+)+")
_FOLDER = re.compile(r"(?:checkpoint|ckpt|global_?step|step|iter|iteration|epoch)[-_=]*(\d+)|(\d{5,})")
_LEVELS = 2  # a file in a folder in the folder of a step
_LONGEST = 200
_DIGITS = 18


def without_wrappers(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return tensors by the names that they have without DDP, ``torch.compile``, FSDP and checkpointing.

    ``module.`` is taken away only where all names begin with it; a model's own submodule of that name keeps it.

    Examples:
        >>> without_wrappers({"module._orig_mod.a.weight": 1, "module._orig_mod.b": 2})
        {'a.weight': 1, 'b': 2}
        >>> without_wrappers({"module.weight": 1, "head.weight": 2})
        {'module.weight': 1, 'head.weight': 2}
    """
    names = {name: _ANYWHERE.sub("", name) for name in tensors}
    while (rest := [name for name in names.values() if name not in _COUNTERS]) and all(
        len(name) > len(_FIRST) and name.startswith(_FIRST) for name in rest
    ):
        names = {
            name: _ANYWHERE.sub("", new.removeprefix(_FIRST)) for name, new in names.items() if new not in _COUNTERS
        }
    if len({*names.values()}) < len(names):  # two wrappers of one name: neither is taken away
        return {**tensors}
    return {new: tensors[name] for name, new in names.items()}


def near(name: str, known: Collection[str]) -> str:
    """Return the most similar name, or an empty one."""
    found = get_close_matches(name, known, 1, 0.6) if len(name) <= _LONGEST else []
    return found[0] if found else ""


def number_in(name: str) -> int | None:
    """Return the last whole number in a file's name, its type left out; fractions are losses, not steps.

    Examples:
        >>> number_in("checkpoint-1000"), number_in("epoch=3-step=1200.ckpt"), number_in("model.safetensors")
        (1000, 1200, None)
        >>> number_in("epoch=3-loss=0.25.ckpt"), number_in("checkpoint.best_loss_3.95.pt")
        (3, None)
    """
    stem = re.sub(r"\.(safetensors|pt|pth|bin|ckpt|tar)$", "", re.sub(r"\.tar$", "", name))
    numbers = _NUMBER.findall(_FRACTION.sub("", stem))
    return int(numbers[-1][:_DIGITS]) if numbers else None


def step_around(path: Path) -> int | None:
    """Return the step in the name of a folder around a file, if that name is nothing else.

    Examples:
        >>> from pathlib import Path
        >>> step_around(Path("out/checkpoint-500/model.safetensors")), step_around(Path("v2-2024/model.safetensors"))
        (500, None)
    """
    for folder in [*path.absolute().parents][:_LEVELS]:
        if (found := _FOLDER.fullmatch(folder.name)) is not None:
            return int((found[1] or found[2])[:_DIGITS])
    return None
