"""Averages that live elsewhere than the model: staged beside the training, and moved in the background."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.engine.plan.moves import Moves
from polyak.kernels.eager.operations import copy_all
from polyak.kernels.layout import dense
from polyak.kernels.threads import background
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from polyak.engine.nonfinite import Nonfinite
    from polyak.engine.plan.groups import Lane
    from polyak.strategy.base import Move
    from polyak.tensors.generators import OwnGenerators

__all__ = ["Offload", "crosses"]


def crosses(average: Tensor, live: Tensor) -> bool:
    """Return whether a tensor on an accelerator is averaged on the CPU."""
    return average.is_cpu and not (live.is_cpu or live.is_meta)


class Offload:
    """Copies the weights into page-locked memory beside the training, and moves the averages on another thread.

    ``stage`` only enqueues copies: on CUDA on a stream of their own, behind the work that was enqueued before. The
    weights must not be overwritten before these copies are made: ``release`` lets what is enqueued from then on wait
    for them. On other devices copies are made at once, and there is nothing to wait for.

    Buffers, which the next forward overwrites, are copied first, and whatever is enqueued next waits for these.

    Needs as much memory on the CPU as the weights, and none on the accelerator.
    """

    def __init__(self, lane: Lane) -> None:
        self.staged = _staging(lane.live)
        self.moves = Moves(lane._replace(live=self.staged))
        self._pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        # Buffers first: the next forward overwrites them, long before the optimiser overwrites the parameters.
        ordered = sorted(zip(lane.stored, self.staged, lane.live, strict=True), key=lambda one: one[0].kind != "buffer")
        for _, staged, live in ordered:
            self._pairs.setdefault(live.device, []).append((staged, live))
        self._buffers = Counter(live.device for stored, _, live in ordered if stored.kind == "buffer")
        on_cuda = [device for device in self._pairs if device.type == "cuda"]
        self._streams = {device: torch.cuda.Stream(device) for device in on_cuda}  # type: ignore[no-untyped-call]  # torch's own
        self._copied: list[torch.cuda.Event] = []

    def start(
        self, moves: Sequence[Move], generators: OwnGenerators, commit: Callable[[], None], nonfinite: Nonfinite
    ) -> Future[bool]:
        """Stage the weights as they are now and return the future of their averaging, as ``Moves.update`` tells it.

        Args:
            moves: What this update does.
            generators: What it draws random numbers from.
            commit: Counts the update; called on the other thread.
            nonfinite: What is done about values that are not finite.
        """
        self._stage()
        copied = self._copied

        def move() -> bool:
            for event in copied:
                event.synchronize()
            with Untracked():
                return self.moves.update(moves, generators, commit, nonfinite)

        return background(move)

    def release(self) -> None:
        """Let all that is enqueued from now on wait until the weights were copied."""
        for event in self._copied:
            torch.cuda.current_stream(event.device).wait_event(event)

    def _stage(self) -> None:
        self._copied = []
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for device, pairs in self._pairs.items():
            if device not in self._streams:
                copy_all([staged for staged, _ in pairs], [live for _, live in pairs])
                continue
            buffers = self._buffers[device]
            with torch.cuda.stream(self._streams[device]):
                self._enqueue(pairs[:buffers], device)
                read = self._streams[device].record_event()
                self._enqueue(pairs[buffers:], device)
                self._copied.append(self._streams[device].record_event())
            if buffers:
                torch.cuda.current_stream(device).wait_event(read)

    def _enqueue(self, pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
        for staged, live in pairs:
            staged.copy_(live, non_blocking=True)
            # `parameter.data = ...` may free its memory, which is not used again before it was copied.
            live.record_stream(self._streams[device])


def _staging(live: Sequence[Tensor]) -> list[Tensor]:
    locked = any(tensor.device.type == "cuda" for tensor in live)
    made: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in live}:
        # One piece of memory: locking pages takes long, whatever their number.
        own = [tensor for tensor in live if tensor.dtype == dtype]
        whole = torch.empty(sum(tensor.numel() for tensor in own), dtype=dtype, device="cpu", pin_memory=locked)
        parts = torch.split(whole, [tensor.numel() for tensor in own])
        made.update({id(t): _like(part, t) for part, t in zip(parts, own, strict=True)})
    return [made[id(tensor)] for tensor in live]


def _like(part: Tensor, live: Tensor) -> Tensor:
    # In the order of the original's memory, so that a copy is one transfer.
    return part.as_strided(live.shape, live.stride()) if dense(live) else part.view(live.shape)
