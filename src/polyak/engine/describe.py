"""What an averager does with every tensor, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.errors.formatting import byte_size, counted
from polyak.kernels.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polyak.engine.options import Options
    from polyak.engine.plan.groups import Group
    from polyak.engine.plan.plan import Plan
    from polyak.strategy.base import Strategy
    from polyak.tensors.entries import Entry
    from polyak.tensors.storage import Stored

__all__ = ["describe"]


def describe(
    strategy: Strategy,
    options: Options,
    n: int,
    stored: Sequence[Stored],
    left: Sequence[Entry],
    plan: Plan | None,
    held: Mapping[str, int],
) -> str:
    """Return a line about the whole, one about what the last update held, and one for each tensor.

    Those that are left alone come last.
    """
    groups = [] if plan is None else (plan.offload or plan).moves.groups
    kernels = {id(a): group.kernel.name for group in groups for lane in group.averages for a in lane}
    rows = [("tensor", "kind", "policy", "shape", "stored as", "kernel", "size")]
    for s in stored:
        place = f"{s.average.dtype} on {s.average.device}".removeprefix("torch.")
        kernel = kernels.get(id(s.average), "-")
        rows.append((_names(s), s.kind, s.policy, str(tuple(s.shape)), place, kernel, byte_size(s.nbytes)))
    rows += [(_names(e), e.kind, "skip", str(tuple(e.tensor.shape)), "-", "-", byte_size(0)) for e in left]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(s.nbytes for s in stored)
    cadence = "each step" if options.every == 1 else f"one step in {options.every}"
    slots = f", {counted(len(names), 'slot')} beside each average" if (names := strategy.slots()) else ""
    head = (
        f"{strategy!r}: {counted(n, 'update')} averaged, {cadence} from step {options.start} on; "
        f"origin {options.origin}, matched by {options.match}, non-finite values: {options.nonfinite}; "
        f"{counted(len(stored), 'tensor')}, {byte_size(total)}{slots}"
    )
    return "\n".join([head, *_held(stored, held), *_tried(groups), *lines])


def _tried(groups: Sequence[Group]) -> list[str]:
    """Return how the kernels were chosen, a line for each group in which they were tried."""
    return [
        f"chosen by trial for {counted(len(group.weights), 'tensor')}: {group.kernel.name}; "
        + ", ".join(f"{name} takes {longer:.2f} times as long" for name, longer in group.kernel.tried.items())
        for group in groups
        if isinstance(group.kernel, Trial) and group.kernel.tried
    ]


def _held(stored: Sequence[Stored], held: Mapping[str, int]) -> list[str]:
    """Return what the last update held, whole tensors first."""
    sizes = {s.name: s.average.numel() for s in stored}
    rows = sorted((held[name] < sizes[name], -held[name], name) for name in held)
    each = [f"{name} (all {sizes[name]})" if not part else f"{name} ({-n} of {sizes[name]})" for part, n, name in rows]
    return [f"held by the last update: {', '.join(each)}"] if each else []


def _names(thing: Stored | Entry) -> str:
    return thing.name + (f" (= {', '.join(thing.aliases[1:])})" if len(thing.aliases) > 1 else "")
