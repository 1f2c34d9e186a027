"""What a merge may be given: how many inputs, a base or none, further files, weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from polyak.errors import ConfigError, MismatchError
from polyak.errors.formatting import shown
from polyak.files.inputs import check_enough, opened, refuse_quantised
from polyak.files.kinds import is_lora
from polyak.files.plan import Entry, as_real, widest
from polyak.files.weights import shares_of
from polyak.strategy.numbers import as_number

if TYPE_CHECKING:
    from contextlib import ExitStack

    import torch

    from polyak.files.checkpoint import Checkpoint
    from polyak.files.plan import Integers
    from polyak.merges.base import Merge

__all__ = ["check_count", "completed", "notes_on_base", "opened_extras", "refuse_lora", "shares_for"]


def check_count(method: Merge, inputs: list[Checkpoint], base: object) -> None:
    """Refuse too few inputs, too many, and a base that is missing or not needed.

    Raises:
        ConfigError: If ``inputs`` or ``base`` do not fit the method.
    """
    least, most = method.inputs
    check_enough(inputs, least)
    if most is not None and len(inputs) > most:
        message = f"{method.name!r} merges {most} files; got {len(inputs)}"
        raise ConfigError(message)
    if method.base == "required" and base is None:
        message = f"{method.name!r} needs the checkpoint that the inputs were fine-tuned from; give base= (--base)"
        raise ConfigError(message)
    if method.base == "none" and base is not None:
        message = f"{method.name!r} takes no base; leave it out, or give it as one of the files"
        raise ConfigError(message)


def notes_on_base(inputs: Sequence[Checkpoint], bases: Sequence[Checkpoint]) -> list[str]:
    """Return a note where the base is an input, too, whose change is then zero."""
    files = {os.path.realpath(one.path) for one in bases}
    twice = [one.path.name for one in inputs if os.path.realpath(one.path) in files]
    return [f"{name} is an input and the base, so its change is zero" for name in twice]


def opened_extras(method: Merge, inputs: list[Checkpoint], held: ExitStack, key: str | None) -> list[Checkpoint]:
    """Return the further checkpoints of a method, which are closed with ``held``.

    Raises:
        ConfigError: If there is not one for each input, or one is quantised.
    """
    paths = method.extras()
    if paths and len(paths) != len(inputs):
        message = f"{method.name!r} names {len(paths)} further files for {len(inputs)} inputs; give one for each"
        raise ConfigError(message)
    # One at a time: several inputs may share one.
    found = [held.enter_context(opened([path], key))[0] for path in paths]
    for one in found:
        refuse_quantised(one)
    return found


def shares_for(method: Merge, weights: Sequence[float] | None, count: int, *, normalize: bool) -> list[float]:
    """Return the weight of each input.

    Raises:
        ConfigError: If ``weights`` are not finite, of another number, or not taken by the method.
    """
    if weights is None:
        return [1.0 if method.weighing == "sum" else 1.0 / count] * count
    if method.weighing == "none":
        message = f"{method.name!r} takes no weights; leave them out"
        raise ConfigError(message)
    listed = isinstance(weights, Sequence) or hasattr(weights, "__array__")
    numbers = [as_number(weight) for weight in weights] if listed else [None]
    if not all(number is not None and math.isfinite(number) for number in numbers):
        message = f"weights: got {shown(weights)}; expected finite numbers"
        raise ConfigError(message)
    given = [float(number) for number in numbers if number is not None]
    if method.weighing == "sum" and not normalize and len(given) == count:
        return given
    return shares_of(given, [None] * count, normalize=normalize)


def completed(
    entry: Entry, count: int, extras: Sequence[Checkpoint], dtype: torch.dtype | None, integers: Integers
) -> Entry:
    """Return an entry with the dtype and the integers of the inputs, and with the further files.

    Raises:
        MismatchError: If a further file lacks the tensor, or has another shape.
    """
    if not entry.combined:
        chosen = 0 if integers == "first" else count - 1
        return replace(entry, chosen=chosen, dtype=entry.sources[chosen].dtype, sources=entry.sources[:count])
    found = []
    for one in extras:
        stored = next((one.tensors[name] for name in entry.names if name in one.tensors), None)
        if stored is None or stored.shape != entry.shape:
            what = "no tensor" if stored is None else f"shape {stored.shape}"
            message = f"{one.path.name!r} has {what} for {shown(entry.names[0])} of shape {entry.shape}"
            raise MismatchError(message)
        found.append(as_real(stored))
    kind = entry.dtype
    if not kind.is_complex:
        kind = dtype or widest([stored.dtype for stored in entry.sources[:count]])
    return replace(entry, dtype=kind, sources=(*entry.sources, *found))


def refuse_lora(inputs: Sequence[Checkpoint]) -> None:
    """Refuse adapters.

    Raises:
        ConfigError: If one of ``inputs`` holds factors of an adapter.
    """
    for one in inputs:
        if is_lora(one.tensors):
            message = (
                f"{str(one.path)!r} holds the factors of an adapter (LoRA), whose product is what changes the weights. "
                "Merge each adapter into its base, and merge those"
            )
            raise ConfigError(message)
