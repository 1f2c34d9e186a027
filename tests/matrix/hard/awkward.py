"""Cases: models that cannot be copied, and models in wrappers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .case import Start, case
from .models import Refuses, filled, old_weight_norm
from .verdict import Verdict, near


@case(
    "the old `weight_norm` is averaged",
    "Its weight is computed, and such a tensor cannot be deep-copied. The norm goes from 1 to 2: the average is 1.1.",
)
def weight_norm(start: Start) -> Verdict:
    return _moves(start, old_weight_norm, "weight_g")


@case(
    "a model that forbids `deepcopy` is averaged",
    "Locks and open handles make models that cannot be copied; from 1 to 2 the average is 1.1.",
)
def no_deepcopy(start: Start) -> Verdict:
    return _moves(start, Refuses, "weight")


@case(
    "`torch.compile` changes nothing",
    "The averager is built for the plain model and updated with `torch.compile(model)`, from 1 to 2: 1.1.",
)
def compiled(start: Start) -> Verdict:
    return _moves(start, lambda: nn.Linear(2, 2), "weight", wrap=lambda model: torch.compile(model, backend="eager"))


@case("`DataParallel` changes nothing", "The same with `nn.DataParallel(model)`.")
def data_parallel(start: Start) -> Verdict:
    return _moves(start, lambda: nn.Linear(2, 2), "weight", wrap=nn.DataParallel)


def _moves(
    start: Start,
    build: Callable[[], nn.Module],
    name: str,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Verdict:
    model = filled(build(), 1.0)
    subject = start(model, twin=build)
    subject.update(wrap(filled(model, 2.0)))
    return near(subject.averages()[name].mean().item(), 1.1)
