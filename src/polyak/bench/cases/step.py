"""What an update adds to a training step: forward, backward and AdamW, then the update, as in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody writes it

from polyak.bench.cases.common import absent_rows, compared_with, rows_of
from polyak.bench.entrants import entrants
from polyak.bench.field import Field
from polyak.bench.race import race, seconds
from polyak.bench.report import Quantiles, Row
from polyak.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.bench.models import Subject
    from polyak.bench.race import Samples
    from polyak.bench.settings import Settings

__all__ = ["step"]

STEP = "training step"


def step(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of an update right after a training step, and its share of that step.

    Raises:
        ConfigError: If the model's input is unknown, or a training step raises.
    """
    if not subject.inputs:
        message = (
            f"the case 'step' trains {subject.name!r} and does not know what to call it with; let the callable "
            f"return a tuple of the model and its inputs"
        )
        raise ConfigError(message)
    field = Field(subject.model, entrants(settings))
    train, steps = _training(subject), list[float]()
    try:
        train()
    except Exception as error:  # the model is the user's: it may raise anything
        reason = " ".join(str(error).split())
        message = f"the case 'step' cannot train {subject.name!r} on its inputs: {type(error).__name__}: {reason}"
        raise ConfigError(message) from error
    field.warm_up()

    def before() -> None:
        steps.append(seconds(train, settings.place))

    samples = race(field.updates, settings.seconds, settings.place, f"step {subject.name}", before)
    steps = steps[1:]  # the first showed how many rounds there is time for
    more = {name: {"share": Quantiles.of(_shares(samples, name, steps))} for name in field.updates}
    first = Row(
        case="step", model=subject.name, subject=STEP, group="limit", remark=subject.description,
        milliseconds=Quantiles.of([1e3 * time for time in steps]),
    )  # fmt: skip
    rows = rows_of("step", subject, samples, compared_with(field), more=more)
    return [first, *rows, *absent_rows("step", subject, field.absent)]


def _shares(samples: Samples, name: str, steps: list[float]) -> list[float]:
    return [time / before for time, before in zip(samples.times[name], steps, strict=True)]


def _training(subject: Subject) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(subject.model.parameters())

    def train() -> None:
        logits = _logits(subject.model(*subject.inputs)).flatten(0, -2)
        targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        F.cross_entropy(logits.float(), targets).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        optimizer.zero_grad()

    return train


def _logits(output: Any) -> Tensor:  # noqa: ANN401 - whatever a model returns
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if hasattr(output, "values") else output))
    return output if output.dim() > 1 else output[None]
