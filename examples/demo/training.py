"""One training run on handwritten digits that feeds every average from the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import process_time
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

if TYPE_CHECKING:
    from demo.contenders import Contender
    from polyak import Averager, Profile

RAW = "raw weights"
BATCH, LEARNING_RATE = 32, 0.05
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""The learning rate as a part of its peak, by the part of the run that is done."""
POINTS = 12  # moments at which a run is tested


@dataclass
class Trace:
    """What one set of weights did in one run.

    Attributes:
        losses: The test loss at each moment of :attr:`Run.steps`.
        accuracy: The test accuracy at the end, in percent.
        seconds: What updates cost in processor time; for the raw weights, what each training step cost.
        profile: The shares at the end; None for the raw weights.
        problem: Why there is nothing, where an average failed.
    """

    losses: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    seconds: list[float] = field(default_factory=list)
    profile: Profile | None = None
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """One run: when it was tested, and what each set of weights did."""

    steps: list[int]
    traces: dict[str, Trace]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, 8 by 8 pixels, a third of them held out for testing."""

    shifted: Tensor
    """The training images, each in 9 copies shifted by at most one pixel; shape (9, n, 1, 8, 8)."""
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> Digits:
        """Return the digits that come with scikit-learn: nothing is downloaded."""
        bunch = load_digits()
        images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16.0
        labels = torch.as_tensor(bunch.target)
        train, test = train_test_split(range(len(labels)), test_size=1 / 3, stratify=bunch.target, random_state=0)
        padded = F.pad(images[train], (1, 1, 1, 1))
        shifted = torch.stack([padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
        return cls(shifted, labels[train], images[test], labels[test])

    @property
    def batches(self) -> int:
        """How many full batches an epoch has."""
        return len(self.labels) // BATCH

    def choosing(self) -> Digits:
        """Return the same with a sixth of the training images for testing, to choose settings by: no test image."""
        aside = len(self.labels) // 6
        unmoved = self.shifted[4]
        return Digits(self.shifted[:, aside:], self.labels[aside:], unmoved[:aside], self.labels[:aside])


def network() -> nn.Module:
    """Return a small convolutional network with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def steps(digits: Digits, model: nn.Module, *, schedule: str, epochs: int) -> Iterator[tuple[float, float]]:
    """Train; after each step, yield its learning rate and what it cost in processor time.

    Args:
        digits: The data.
        model: What learns them.
        schedule: A name of :data:`SCHEDULES`.
        epochs: How often the data are seen.
    """
    total = epochs * digits.batches
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULES[schedule](step / total))
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.labels))[: digits.batches * BATCH].split(BATCH):
            began = process_time()
            images = digits.shifted[torch.randint(9, (BATCH,)), batch]
            F.cross_entropy(model(images), digits.labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield float(scheduler.get_last_lr()[0]), process_time() - began
            scheduler.step()


def train(
    digits: Digits, contenders: Sequence[Contender], *, schedule: str, seed: int, epochs: int, tick: Callable[[], None]
) -> Run:
    """Train once and feed every contender from the same weights.

    Args:
        digits: The data.
        contenders: What to average.
        schedule: A name of :data:`SCHEDULES`.
        seed: Decides the first weights and the order of the data.
        epochs: How often the data are seen.
        tick: Called after every step.
    """
    torch.manual_seed(seed)
    model, total = network(), epochs * digits.batches
    averagers = {c.label: c.config.build(model) for c in contenders if c.config}
    traces = {RAW: Trace()} | {c.label: Trace(problem=c.problem) for c in contenders}
    moments = sorted({max(1, round(total * i / POINTS)) for i in range(1, POINTS + 1)})
    for step, (lr, seconds) in enumerate(steps(digits, model, schedule=schedule, epochs=epochs), 1):
        traces[RAW].seconds.append(seconds)
        _update(averagers, traces, step, lr)
        if step in moments:
            _test(model, averagers, traces, digits)
        tick()
    for label, averager in averagers.items():
        traces[label].profile = averager.profile()
    return Run(moments, traces)


def _update(averagers: dict[str, Averager], traces: dict[str, Trace], step: int, lr: float) -> None:
    labels = list(averagers)
    turn = step % len(labels) if labels else 0
    for place, label in enumerate(labels[turn:] + labels[:turn]):
        averager, n, began = averagers[label], averagers[label].n, process_time()
        try:
            averager.update(lr=lr)
        except Exception as error:  # noqa: BLE001 - somebody's plugin failed, which must not take the others with it
            traces[label] = Trace(problem=f"failed at step {step}: {error}")
            del averagers[label]
            continue
        # The first update after a step finds cold caches, as the only one would; before `start` it does nothing.
        if place == 0 and averager.n > n:
            traces[label].seconds.append(process_time() - began)


@torch.no_grad()
def _test(model: nn.Module, averagers: dict[str, Averager], traces: dict[str, Trace], digits: Digits) -> None:
    model.eval()
    forwards: dict[str, Callable[[Tensor], Tensor]] = {RAW: model, **averagers}
    for label, forward in forwards.items():
        logits = forward(digits.test_images)
        traces[label].losses.append(F.cross_entropy(logits, digits.test_labels).item())
        traces[label].accuracy = 100.0 * (logits.argmax(1) == digits.test_labels).float().mean().item()
    model.train()
