"""The weights that recorded averages start from, taken at their first updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.posthoc.snapshot import START
from polyak.posthoc.sources import fastest_of, last_before, start_of, weights_of
from polyak.posthoc.strangers import Past, remember
from polyak.ranks.consensus import agreement
from polyak.strategy.profile import Profile
from polyak.tensors.finite import FiniteCheck

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from polyak.engine import Engine
    from polyak.posthoc.writer import Folder

__all__ = ["Starts"]


@dataclass(eq=False)
class _Start:
    weights: dict[str, Tensor]
    digest: str = ""


class Starts:
    """The starts that were taken and not written yet.

    Averages that the first update replaces have no start. If all do, the weights before that update are kept.

    Args:
        engines: The averages, by name.
        folder: Where starts are written.
        meshes: The ranks that have parts of the tensors, if these are sharded.
    """

    def __init__(self, engines: Mapping[str, Engine], folder: Folder, meshes: Sequence[DeviceMesh]) -> None:
        self._engines, self._folder = engines, folder
        self._counted = [name for name, engine in engines.items() if engine.options.origin == "initial"]
        self._wanted = self._counted or [fastest_of(engines)]
        for name in self._wanted:
            _ = engines[name].averages  # one that the first update replaces takes the weights of now
        self._agree = agreement(meshes)
        self._taken: dict[str, _Start] = {}
        self._written: set[str] = set()
        self._new = False

    def take(self, name: str) -> None:
        """Copy the start of an average that has no update yet; equal starts share one copy.

        A start that is not finite is skipped, since the first update replaces it.
        """
        engine = self._engines[name]
        if name not in self._wanted or name in self._written or engine.n:
            return
        weights = start_of(engine, self._folder.layout)
        self._taken.pop(name, None)
        if not self._agreed(FiniteCheck([_local(weights[key]) for key in self._folder.layout.averaged])()):
            return
        for other in self._distinct():
            same = all(_same(other.weights[key], tensor) for key, tensor in weights.items())
            if self._agreed(same):
                self._taken[name] = other
                return
        self._taken[name] = _Start({key: tensor.detach().clone() for key, tensor in weights.items()})

    def identify(self) -> set[str]:
        """Give each average that has just begun the identity of its start; return these identities."""
        for name in self._wanted:
            if name not in self._taken:  # its first update comes later than the others'
                self.take(name)
        for start in self._distinct():
            start.digest = start.digest or self._folder.digest(start.weights)
        begun = {self._engines[name]: self._taken[name].digest for name in self._counted if name in self._taken}
        for engine, digest in begun.items():
            engine.identity = engine.identity._replace(start=digest)
        return {*begun.values()}

    def begin(self, step: int, *, new: bool) -> int:
        """Look, at the first update, whether what lies in the folder is this run's; return the step before it.

        Args:
            step: The optimiser step.
            new: Whether no average had an update before.

        Raises:
            StateError: If it is another run's.
        """
        self._new = new
        last = None if new else last_before(step, self._engines)
        pasts = {
            name: Past(engine.identity, last_before(step, {name: engine})) for name, engine in self._engines.items()
        }
        restored = any(engine.loads for engine in self._engines.values())
        marks = self._folder.take_over(last, pasts, self.identify(), restored=restored)
        for name, newer in marks.items():
            remember(self._engines[name], *newer)
        return max(0, last or 0)

    def identify_first(self, name: str) -> None:
        """Give an average that its first update has just replaced the identity of these weights."""
        engine = self._engines[name]
        if engine.n == 1 and name not in self._counted:
            digest = self._folder.digest(weights_of(engine, self._folder.layout))
            engine.identity = engine.identity._replace(start=digest)

    def write(self, step: int) -> None:
        """Write the starts of averages that began after an optimiser step."""
        for number, start in enumerate(self._distinct()):
            names = [name for name, other in self._taken.items() if other is start]
            nothing = Profile(np.empty(0), np.empty(0, np.int64), start=1.0)
            # The run's own start may be of step 0, too, if steps count from there.
            suffix = f".{start.digest}" if number or not (step or self._new) else ""
            strategy = self._engines[names[0]].strategy
            self._folder.put(START, step, start.weights, nothing, strategy, start=start.digest, suffix=suffix)
            self._written |= {*names}
        self._taken.clear()

    def forget(self) -> None:
        """Forget the starts of averages that go on elsewhere."""
        self._taken.clear()
        self._written.clear()

    def _agreed(self, answer: bool) -> bool:  # noqa: FBT001 - it is the answer
        return answer if self._agree is None else self._agree(answer)

    def _distinct(self) -> list[_Start]:
        return [*dict.fromkeys(self._taken.values())]


def _local(tensor: Any) -> Tensor:  # noqa: ANN401 - a DTensor, where it is sharded
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _same(one: Tensor, other: Tensor) -> bool:
    here, there = _local(one), _local(other)
    return here.dtype == there.dtype and here.device == there.device and torch.equal(here, there)
