"""Time calls side by side: rounds in which each runs once, in an order that is shuffled for every round."""

from __future__ import annotations

import gc
import random
import warnings
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from polyak.errors import PolyakWarning
from polyak.io.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["LEAST", "MOST", "Samples", "orders", "race", "seconds"]

LEAST, MOST = 5, 300
"""So many rounds are made at least and at most, whatever time there is."""
_WAITED = 0.05
_TASKS = Path("/proc/self/task")


class Samples:
    """The seconds of each call in each round, and whether threads had to wait for a processor meanwhile."""

    def __init__(self, names: Iterable[str]) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self.calm: dict[str, list[bool]] = {name: [] for name in self.times}

    def add(self, name: str, took: float, waited: float = 0.0) -> None:
        """Take the sample of a round."""
        self.times[name].append(took)
        self.calm[name].append(waited <= _WAITED * took)

    def of(self, name: str) -> list[float]:
        """Return the seconds of the rounds in which nothing disturbed the call; all where those are too few."""
        kept = [time for time, calm in zip(self.times[name], self.calm[name], strict=True) if calm]
        return kept if len(kept) >= LEAST else self.times[name]

    def disturbed(self, name: str) -> float:
        """Return the share of the samples of a call in which threads had to wait for a processor."""
        return 1 - sum(self.calm[name]) / len(self.calm[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """Return one call's time divided by another's, round by round, undisturbed rounds where there are enough.

        A ratio within a round is not touched by what slows a whole round down.
        """
        pairs = list(zip(self.times[name], self.times[to], strict=True))
        calm = map(all, zip(self.calm[name], self.calm[to], strict=True))
        kept = [pair for pair, undisturbed in zip(pairs, calm, strict=True) if undisturbed]
        return [a / b for a, b in (kept if len(kept) >= LEAST else pairs)]

    def fastest(self, names: Sequence[str]) -> str:
        """Return the name of the call with the smallest median."""
        return min(names, key=lambda name: median(self.of(name)))


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> list[list[str]]:
    """Return a shuffled order of all names for each round, the same for the same seed.

    Examples:
        >>> [sorted(order) for order in orders(["a", "b"], 2)]
        [['a', 'b'], ['a', 'b']]
    """
    generator = random.Random(seed)  # noqa: S311 - an order, no secret
    return [generator.sample(list(names), len(names)) for _ in range(rounds)]


def race(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    device: torch.device,
    label: str,
    before: Callable[[], object] | None = None,
    warm: int = 0,
    agreed: Callable[[int], int] = int,
) -> Samples:
    """Return the samples of as many rounds as ``budget`` seconds hold; ``before`` is called first in every round.

    Each call is made ``warm`` times untimed before it is timed: then its own data is in the caches. Several ranks make
    as many rounds as ``agreed`` makes of what each has time for.

    Every call must have run before. The collector of garbage waits.
    """
    samples = Samples(calls)
    gc.collect()
    began = perf_counter()
    _one_round(calls, Samples(calls), list(calls), device, before, warm)  # shows how many rounds there is time for
    rounds = agreed(min(max(round(budget / (perf_counter() - began)), LEAST), MOST))
    gc.disable()
    try:
        with warnings.catch_warnings():
            # Between rounds nothing trains, which would be a mistake anywhere else.
            warnings.filterwarnings("ignore", "the weights have not changed", PolyakWarning)
            for order in track(orders(list(calls), rounds), label):
                _one_round(calls, samples, order, device, before, warm)
    finally:
        gc.enable()
    return samples


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes, until the device has done all that it was given."""
    _wait_for(device)
    start = perf_counter()
    made = call()
    _wait_for(device)
    took = perf_counter() - start
    del made  # only now: taking apart what was made is not part of making it
    return took


def _one_round(
    calls: Mapping[str, Callable[[], object]],
    samples: Samples,
    order: Sequence[str],
    device: torch.device,
    before: Callable[[], object] | None,
    warm: int,
) -> None:
    if before is not None:
        before()
    for name in order:
        already, began = _waited(), perf_counter()  # before the warm calls: it reads files, which would cool them
        for _ in range(warm):
            calls[name]()
        took = seconds(calls[name], device)
        samples.add(name, took, (_waited() - already) * took / (perf_counter() - began))


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _waited() -> float:
    """Return for how many seconds threads of this process have been ready and had no processor; 0 if not on Linux."""
    try:
        counters = [(task / "schedstat").read_text().split() for task in _TASKS.iterdir()]
        return sum(int(numbers[1]) for numbers in counters) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
