"""What an average will cost at a given size, on paper: memory, traffic and time per update on each rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from polyak.errors import ArgumentError, ConfigError
from polyak.errors.formatting import shown
from polyak.strategy.numbers import given_integer, given_positive

__all__ = ["Budget", "Hardware", "Job", "budget"]

T = TypeVar("T", "Job", "Hardware")

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_COUNTED = frozenset({"ranks", "replicas", "node"})
_OPEN = frozenset({"step", "tokens"})


@dataclass(frozen=True)
class Job:
    """The training run.

    Attributes:
        params: Values in the model (70e9 for a 70 B model).
        ranks: Processes, one accelerator each.
        replicas: Copies of the sharded model (HSDP); equal to ``ranks`` under DDP, where each has all of it.
        weights: The dtype of the weights that are averaged; under FSDP2 the dtype of the sharded master weights.
        step: Seconds that a training step takes. Defaults to an estimate from ``tokens`` and the hardware's speed.
        tokens: Tokens in a step of all ranks; a step then takes ``6 * params * tokens / (ranks * flops)`` seconds.
    """

    params: float
    ranks: int = 1
    replicas: int = 1
    weights: str = "float32"
    step: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Hardware:
    """What the run is on; the defaults are round figures of a node of eight H100.

    Attributes:
        memory: Bytes per second that an accelerator's memory moves.
        link: Bytes per second from an accelerator to the host, one way.
        host: Bytes per second that the host's memory moves, for all ranks of a node.
        node: Ranks on a node.
        flops: Operations per second that an accelerator sustains in training.
    """

    memory: float = 3.35e12
    link: float = 25e9
    host: float = 300e9
    node: int = 8
    flops: float = 400e12


@dataclass(frozen=True)
class Budget:
    """What averaging costs each rank; bytes and seconds.

    Attributes:
        elements: Values of a rank's shard.
        averages: Memory of the averages, where they live.
        staging: Page-locked memory on the host that weights go through; 0 for an average on the model's device.
        on_node: Memory of the host that all ranks of a node take; 0 for an average on the model's device.
        moved: What an update moves through the accelerator's memory.
        sent: What it sends to the host.
        on_host: What it moves through the host's memory, for one rank.
        seconds: What an update takes, at these speeds and if nothing else used them.
        exchange: What putting an average into the model moves, and at most what taking it out moves.
        aside: What is kept meanwhile: the weights, where the average has another dtype and cannot hold them.
        gathered: Memory of rank 0 for ``averaged_state_dict(full=True)``.
        saved: What a checkpoint of the averages takes, written by all ranks together.
        step: Seconds of a training step; None where neither they nor the tokens were given.
    """

    elements: float
    averages: float
    staging: float
    on_node: float
    moved: float
    sent: float
    on_host: float
    seconds: float
    exchange: float
    aside: float
    gathered: float
    saved: float
    step: float | None

    def every(self, share: float) -> int | None:
        """Return the smallest ``every=`` whose updates cost less than a share of the training; None without ``step``.

        Raises:
            ConfigError: If ``share`` is not a positive number.

        Examples:
            >>> cost = budget(Job(70e9, ranks=64, tokens=262144), device="cpu")
            >>> cost.every(0.01), cost.every(0.5)
            (15, 1)
        """
        share = given_positive("share", share)
        return None if self.step is None else max(1, math.ceil(self.seconds / (share * self.step)))


def budget(
    job: Job,
    hardware: Hardware | None = None,
    *,
    dtype: str = "float32",
    device: str = "cuda",
    averages: int = 1,
    checked: bool = False,
) -> Budget:
    """Return the cost of averaging for each rank.

    Per value and update: the weights are read once, and once more by the check for NaN; each average is read and
    written. The fused kernel does that for all dtypes and for banks; the others of plain torch for a lone average that
    has the dtype of the weights. Shards are averaged where they are: nothing is sent between ranks, but a byte where it
    is checked. What is not sharded, such as FSDP2's buffers, does not count: each rank has all of it.

    Args:
        job: The run.
        hardware: What it is on.
        dtype: Of the averages.
        device: Where they live: with the model ("cuda"), or on the host ("cpu").
        averages: How many there are, as in a bank; each slot of a strategy with slots is one more.
        checked: Whether non-finite weights are looked for (``nonfinite="skip"`` or ``"raise"``).

    Raises:
        ArgumentError: If ``job`` is not a ``Job``, or ``hardware`` no ``Hardware``.
        ConfigError: If a number is not positive, replicas do not divide the ranks, or a dtype or device is unknown.

    Often confused with: a measurement; ``polyak bench`` measures.

    Examples:
        >>> cost = budget(Job(70e9, ranks=64))
        >>> round(cost.averages / 2**30, 2), round(1e3 * cost.seconds, 1)  # GiB, ms
        (4.07, 3.9)
    """
    job, hardware = _checked(job), Hardware() if hardware is None else _plain(hardware, Hardware, "memory")
    averages, dtype = given_integer("averages", averages, 1), _dtype("dtype", dtype)
    if device not in ("cuda", "cpu"):
        message = f"device: got {shown(device)}; expected 'cuda' (with the model) or 'cpu' (on the host)"
        raise ConfigError(message)
    w, a = _BYTES[job.weights], _BYTES[dtype] * averages
    elements = job.params * job.replicas / job.ranks
    words = (2 if checked else 1) * w + 2 * a
    offloaded = device == "cpu"
    moved = elements * (w if offloaded else words)
    sent = elements * w if offloaded else 0.0
    on_host = elements * (w + words) if offloaded else 0.0
    on_node = min(hardware.node, job.ranks)
    alike = dtype == job.weights
    # A clone of the weights and a copy of the average; where the dtype is the same, the clone goes where that was.
    exchanged = 6 * w if alike else 3 * w + _BYTES[dtype]
    seconds = sent / hardware.link + on_host * on_node / hardware.host if offloaded else moved / hardware.memory
    step = job.step
    if step is None and job.tokens is not None:
        step = 6 * job.params * job.tokens / (job.ranks * hardware.flops)
    return Budget(
        elements=elements, averages=elements * a, staging=sent, on_node=(elements * a + sent) * on_node * offloaded,
        moved=moved, sent=sent, on_host=on_host, seconds=seconds,
        exchange=exchanged * elements, aside=0.0 if alike else elements * w,
        gathered=job.params * w, saved=job.params * a, step=step,
    )  # fmt: skip


def _checked(job: Job) -> Job:
    job = replace(_plain(job, Job, "params"), weights=_dtype("weights", job.weights))
    if job.step is not None and job.tokens is not None:
        message = f"got step={job.step!r} and tokens={job.tokens!r}; give one of them"
        raise ConfigError(message)
    if job.ranks % job.replicas:
        message = f"replicas: got {job.replicas} for {job.ranks} ranks; expected a divisor (1: all sharded)"
        raise ConfigError(message)
    return job


def _plain(given: T, kind: type[T], example: str) -> T:
    """Return a job or the hardware with numbers of Python, each checked."""
    if not isinstance(given, kind):
        name = kind.__name__
        message = (
            f"budget() got {shown(given)} as the {name.lower()}; expected polyak.planning.budget.{name}({example}=...)"
        )
        raise ArgumentError(message)
    numbers: dict[str, Any] = {}
    for name, value in vars(given).items():
        if name in _COUNTED:
            numbers[name] = given_integer(name, value, 1)
        elif name != "weights" and not (value is None and name in _OPEN):
            numbers[name] = given_positive(name, value)
    return replace(given, **numbers)


def _dtype(name: str, value: object) -> str:
    dtype = str(value).removeprefix("torch.")
    if dtype not in _BYTES:
        message = f"{name}: got {shown(value)}; expected {', '.join(_BYTES)}"
        raise ConfigError(message)
    return dtype
