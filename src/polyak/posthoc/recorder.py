"""The recorder: follows an averager and keeps snapshots for synthesis after the run."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from polyak.engine.averager import refuse_other
from polyak.errors import ConfigError, StateError
from polyak.errors.formatting import type_name
from polyak.io.atomic import as_path
from polyak.posthoc.snapshot import BLOCKS, START, safetensors
from polyak.posthoc.sources import (
    are_steps,
    block_means,
    digested_of,
    engines_of,
    fastest_of,
    frozen_of,
    layout_of,
    refuse_growth,
    shapes_of,
    warn_unclosed,
    weights_of,
)
from polyak.posthoc.starts import Starts
from polyak.posthoc.strangers import remember
from polyak.posthoc.writer import Folder
from polyak.strategy.numbers import given_integer
from polyak.tensors.storage import as_dtype

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from types import TracebackType

    import torch

    from polyak.engine import Engine
    from polyak.engine.averager import Averager
    from polyak.engine.bank import Bank
    from polyak.strategy.clock import Clock

__all__ = ["Recorder"]


class Recorder:
    """Follows an averager or a bank by itself and writes snapshots, from which any average can be computed later.

    A snapshot is an average at one moment with its profile: a safetensors file, whole or absent. ``close()``, or the
    end of a ``with``, writes the last updates. Without it, a warning names them when the recorder or the process ends.

    Args:
        averager: What ``polyak.average`` or ``polyak.bank`` returned; each average of a bank is a series of snapshots.
        directory: The folder to write to; made where it is missing. One run has a folder of its own.
        every: The optimiser steps from one snapshot to the next. 64 snapshots in a run rebuild most averages well.
        keep: How many snapshots of each series are kept, the latest. Defaults to all.
        blocks: Whether plain means of the weights of each ``every`` steps are kept, too, which rebuild averages that
            were not thought of and need no negative coefficients. They cost one more pass over the weights for each
            update. None: unless all averages are ``power`` ones, or one is ``block_mean``.
        dtype: The dtype of what is averaged; "auto": the average's own, float32 at the least. Shorter ones save disk,
            and synthesis amplifies their rounding (``Synthesis.rounding``).

    Raises:
        ConfigError: If a setting is wrong, or the averager's updates run in a graph or in the background.
        MissingExtraError: If safetensors is not installed.

    While it follows, ``update()`` raises SnapshotError where a snapshot cannot be written (the update is made, and
    training can go on), and StateError if the folder holds another run's snapshots, or another run's state was loaded.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2023), arXiv:2312.02696,
    section 3.2, for power-function averages; block means and other families are linear in the same way.

    Often confused with: checkpoints. Raw weights of single steps cannot be averaged into the mean of the steps between.

    Examples:
        >>> import polyak, tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> averager = polyak.average(model, "ema", decay=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with polyak.posthoc.Recorder(averager, folder, every=25):
        ...         for step in range(100):
        ...             averager.update()
        ...     made = polyak.posthoc.synthesize(folder, "swa")
        >>> sorted(made.state_dict), made.profile_error < 1e-12
        (['bias', 'weight'], True)
    """

    def __init__(
        self,
        averager: Averager | Bank,
        directory: str | os.PathLike[str],
        *,
        every: int,
        keep: int | None = None,
        blocks: bool | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> None:
        refuse_other("posthoc.Recorder", averager, directory, "directory, every=...")
        every = given_integer("every", every, 1)
        keep = None if keep is None else given_integer("keep", keep, 1)
        safetensors()
        short = as_dtype(dtype)
        if short == "model":
            message = "dtype='model': snapshots are written in one dtype; expected 'auto' or a dtype such as 'bfloat16'"
            raise ConfigError(message)
        # A script may change its directory.
        self.directory, self._every = as_path(directory, "the folder of a Recorder").absolute(), every
        self._engines = engines_of(averager)
        layout = layout_of(next(iter(self._engines.values())))
        self._blocks = block_means(self._engines, blocks)
        self._fastest = fastest_of(self._engines)
        self._seen: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._updates: dict[str, int] = {}
        self._loads: dict[str, int] = {}
        self._begun = self._new = False
        self._before = 0
        own = {START} if self._blocks is None else {START, BLOCKS}
        if taken := sorted(own & self._engines.keys()):
            message = f"the names {taken} of averages belong to the recorder's own snapshots; give them others"
            raise ConfigError(message)
        stored = [stored for engine in self._engines.values() for stored in engine.stored]
        meshes = [one.spread.mesh for one in stored if one.spread]
        digested = digested_of(next(iter(self._engines.values())), layout)
        frozen = frozen_of(next(iter(self._engines.values())), layout)
        self._folder = Folder(
            self.directory, layout, dtype=short, keep=keep, digested=digested, frozen=frozen, meshes=meshes
        )
        self._starts = Starts(self._engines, self._folder, meshes)
        self._shapes = {name: shapes_of(engine) for name, engine in self._series().items()}
        self._listeners = [(one, self._listener(name), self._opener(name)) for name, one in self._engines.items()]
        for engine, listener, opener in self._listeners:
            engine.updater.listeners.append(listener)
            engine.updater.openers.append(opener)
        self._unclosed = weakref.finalize(self, warn_unclosed, self.directory, self._seen, self._written)

    def close(self) -> None:
        """Write the snapshots of the last updates, and follow no longer; twice is once."""
        for engine, listener, opener in self._listeners:
            engine.synchronize()
            if listener in engine.updater.listeners:
                engine.updater.listeners.remove(listener)
            if opener in engine.updater.openers:
                engine.updater.openers.remove(opener)
        self._listeners = []
        self._unclosed.detach()
        if not self._begun and self._late():  # its state was loaded, and no update came
            self._begin(max(self._seen.values()) + 1)
        with ExitStack() as rest:  # a snapshot that cannot be written keeps none of the others from being written
            rest.callback(self._folder.release)
            for name in reversed(self._late()):
                rest.callback(self._write, name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume between two snapshots: the mean of the current block."""
        blocks = None if self._blocks is None else self._blocks.state_dict()
        return {"seen": dict(self._seen), "written": dict(self._written), BLOCKS: blocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the state was taken; without it, the first block after a resume is a shorter one.

        Raises:
            StateError: If ``state`` is not a state of a recorder like this one. Nothing is changed then.
        """
        if not isinstance(state, dict) or {*state} != {"seen", "written", BLOCKS} or not are_steps(state):
            got = f"the keys {sorted(map(str, state))}" if isinstance(state, dict) else type_name(state)
            message = f"expected what Recorder.state_dict() returned; got {got}"
            raise StateError(message)
        if (state[BLOCKS] is None) != (self._blocks is None):
            message = "the state was saved with another setting of blocks=; build the recorder with that one"
            raise StateError(message)
        if self._blocks is not None:
            self._blocks.load_state_dict(state[BLOCKS])
        self._forget()
        self._seen |= state["seen"]
        self._written |= state["written"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _late(self) -> list[str]:
        return [name for name in self._series() if self._seen.get(name, -1) > self._written.get(name, -1)]

    def _series(self) -> dict[str, Engine]:
        return self._engines if self._blocks is None else {**self._engines, BLOCKS: self._blocks}

    def _opener(self, name: str) -> Callable[[Any], None]:
        def opening(averager: Averager) -> None:
            if averager is self._engines[name]:
                self._notice_loads()
                self._starts.take(name)

        return opening

    def _listener(self, name: str) -> Callable[[Any, Clock], None]:
        def updated(averager: Averager, clock: Clock) -> None:
            if averager is not self._engines[name]:  # a copy of it, which took the listeners along
                return
            self._notice_loads()
            if clock.n != self._updates.get(name, clock.n - 1) + 1:
                self._go_on_elsewhere()
            self._updates[name] = clock.n
            first = not self._begun
            if first:
                self._begin(clock.step)
            self._starts.identify_first(name)
            if self._blocks is not None and name == self._fastest:
                self._blocks.update(self._engines[name].updated_model, step=clock.step)
            if first:
                self._starts.write(self._before)
            if name == self._fastest and self._blocks is not None:
                self._due(BLOCKS, clock)
            self._due(name, clock)

        return updated

    def _due(self, name: str, clock: Clock) -> None:
        previous = self._seen.get(name, clock.step - clock.stride)
        self._seen[name] = clock.step
        if clock.step // self._every > previous // self._every:
            self._write(name)

    def _write(self, name: str) -> None:
        engine = self._series()[name]
        if not engine.n:  # every update of a block was skipped because of a NaN
            return
        refuse_growth(engine, self._shapes[name])
        self._starts.write(self._before)
        profile = engine.profile()
        step = int(profile.steps[-1])
        if engine is self._blocks and name in self._written:
            profile = replace(profile, stride=int(profile.steps[0]) - self._written[name])
        weights, start = weights_of(engine, self._folder.layout), engine.identity.start
        mark = self._folder.put(name, step, weights, profile, engine.strategy, start=start)
        remember(engine, (step, mark))
        self._written[name] = step
        if engine is self._blocks:
            engine.restart()

    def _begin(self, step: int) -> None:
        """Look, at the first update, whether what lies in the folder is this run's."""
        before = (engine.n - (engine.progress.averaged == step) for engine in self._engines.values())
        self._new = self._new or not any(n > 0 for n in before)
        self._before = self._starts.begin(step, new=self._new)
        self._begun = True

    def _notice_loads(self) -> None:
        """Go on elsewhere if a state was loaded into an average since its last update."""
        loads = {name: engine.loads for name, engine in self._engines.items()}
        if self._loads not in ({}, loads):
            self._go_on_elsewhere()
        self._loads = loads

    def _go_on_elsewhere(self) -> None:
        """Forget what was seen before another state was loaded into the averager."""
        self._forget()
        if self._blocks is not None:
            self._blocks = block_means(self._engines, wanted=True)

    def _forget(self) -> None:
        for steps in (self._seen, self._written, self._updates, self._loads):
            steps.clear()
        self._starts.forget()
        self._begun = self._new = False
