"""What an averager doubts, and warns of once: a start, weights or an average that can hardly be meant."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING

import torch

from polyak.engine.writes import many, writes
from polyak.errors import NonFiniteError, PolyakError
from polyak.tensors.finite import FiniteCheck
from polyak.tensors.swap import in_force

if TYPE_CHECKING:
    from polyak.engine.core import Core
    from polyak.engine.plan.plan import Plan
    from polyak.engine.sources import Sources

__all__ = ["LOOK", "doubt_average", "doubt_resumed", "doubt_weights", "replaces_start"]

LOOK = 128
"""The update before which ``doubt_weights`` looks."""

_SHOWN = 200  # characters

_TRAINED = 10  # updates: a shorter run may have had no gradients yet

_UPDATES, _SHARE = 100, 0.5
"""From so many updates on, an average with a larger share of the start is warned of."""


def replaces_start(core: Core, plan: Plan) -> bool:
    """Return whether the first update replaces the start of the average, which is not finite; warn once then.

    Raises:
        NonFiniteError: If the start is not finite under ``nonfinite="raise"``.
    """
    starts = [s for s in plan.stored if s.policy == "average"]
    finite = FiniteCheck([t for s in starts for t in s.tensors])()
    if finite if plan.lane.agree is None else plan.lane.agree(finite):
        return False
    names = ", ".join(s.name for s in starts if not FiniteCheck(s.tensors)())[:_SHOWN] or "weights of another rank"
    what = f"the weights that the averager was built from hold NaN or infinities (in {names})"
    if core.options.nonfinite == "raise":
        message = f"{what}; the average is unchanged. Build it from finite weights, or with origin='first'."
        raise NonFiniteError(message)
    core.warn("origin", f"{what}; the first update replaces them, as with origin='first'")
    return True


def doubt_weights(core: Core, plan: Plan) -> None:
    """Warn once if no weight has ever changed although some want gradients: their average equals them, bit for bit.

    Version counters are looked at first, those of buffers too, which a forward in train mode writes. Optimisers that
    write through ``.data`` leave them as they are.
    """
    if core.built is None or core.options.capturable or plan.offload is not None:
        return
    if not any(t.requires_grad for t in plan.live) or writes(plan.live) != core.built:
        return
    pairs = [(s.average, t) for s, t in zip(plan.stored, plan.live, strict=True) if s.policy == "average"]
    if all(torch.equal(average, live.detach().to(average.dtype)) for average, live in pairs):
        message = (
            f"the weights have not changed in {LOOK - 1} updates; was the model built again after the averager? "
            "Build the averager from the model that the optimiser trains."
        )
        core.warn("constant", message)


def doubt_resumed(core: Core) -> None:
    """Warn once if the model's weights equal the average that was loaded, bit for bit.

    A checkpoint that was taken inside ``applied()`` holds the average as the model's weights; training that resumes
    from it goes on from the average.
    """
    state, model = core.state, core.binding.model
    if model is None or state.progress.n < _TRAINED or state.progress.rate == 1 or core.binding.holds_average(model):
        return
    try:
        entries = core.binding.adapter(model).entries(model)  # no plan: that would settle what the model lacks yet
    except PolyakError:  # the state is loaded; the next update says what does not fit
        return
    live = {entry.name: entry.tensor for entry in entries if entry.tensor.requires_grad and not entry.tensor.is_meta}
    trained = [(s.average, live[s.name]) for s in state.stored if s.policy == "average" and s.name in live]
    if trained and all(torch.equal(average, weight.detach().to(average)) for average, weight in trained):
        message = (
            f"the model's weights equal the average of {state.progress.n} updates that was loaded, bit for bit; was "
            "the checkpoint taken inside applied()? Training would go on from the average. Take checkpoints outside."
        )
        core.warn("resumed", message)


def doubt_average(core: Core, sources: Sources, plan: Plan) -> None:
    """Warn once where an average that is about to be read was never updated, or is mostly its start."""
    progress = core.state.progress
    # While an average is in a model, its parameters' counts of writes are numbers of the swap.
    counted = bool(progress.calls) or bool(in_force)
    if not counted and (name := sources.idle()):
        message = (
            f"the averager is attached to {name}, whose step() has never run though its parameters were changed "
            "many times: nothing was averaged. Attach to the optimiser that steps, or call averager.update()."
        )
        core.warn("idle", message)
    elif not counted and not core.options.capturable and _trained(core, plan):
        message = (
            "the average has never been updated although the weights have changed; call averager.update() after "
            "each optimizer.step()"
        )
        core.warn("never", message)
    if progress.n >= _UPDATES and "start" not in core.warned:
        _doubt_start(core)


def _trained(core: Core, plan: Plan) -> bool:
    """Return whether a parameter was written to many times since the averager was built."""
    built, now = core.built, writes(plan.live)
    if built is None or now is None or len(built) != len(now):
        return False
    parameters = [s.kind == "parameter" for s in plan.stored]
    return many([*compress(built, parameters)], [*compress(now, parameters)])


def _doubt_start(core: Core) -> None:
    several = bool(core.strategy.slots())
    share = abs(core.profile().start) if several else core.state.history.start
    if share > _SHARE:
        message = (
            f"after {core.state.progress.n} updates the average is still {share:.0%} the weights that it started from; "
            "the strategy 'ema_debiased' and origin='first' replace them by the first update, and a smaller decay "
            "forgets them"
        )
        core.warn("start", message)
    core.warned.add("start")  # the share of the start only falls
