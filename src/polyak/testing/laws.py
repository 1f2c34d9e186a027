"""The laws, each a function that raises an ``AssertionError`` with the numbers."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from polyak.config import AveragerConfig
from polyak.config.factory import average
from polyak.errors import ArgumentError
from polyak.registry import registry
from polyak.strategy.base import settings_of
from polyak.testing.rates import ROUNDING, UPDATES, Case, expected, rates_are_shares, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from polyak.engine.averager import Averager
    from polyak.strategy.profile import Profile

__all__ = ["LAWS"]

_ALL = range(1, UPDATES + 1)
_HALF = UPDATES // 2


def _one_hot_is_the_profile(case: Case) -> None:
    profile = expected(case, _ALL)
    shares = [profile.start, *profile.shares.tolist()]
    model = {"weight": torch.eye(UPDATES + 1, dtype=torch.float64, device="cpu")[0].clone()}
    averager = average(model, case.strategy, dtype="float64")
    for n in _ALL:
        model["weight"].zero_()[n] = 1.0
        averager.update(lr=case.lr(n))
    profile = averager.profile()
    answers = {
        "profile() says": [profile.start, *profile.shares.tolist()],
        "holds": averager.averages["weight"].tolist(),
    }
    for says, got in answers.items():
        worst = int(np.abs(np.subtract(got, shares)).argmax())
        numbers = f"update {worst} has the share {shares[worst]!r} by the rates, and the average {says} {got[worst]!r}"
        require(abs(got[worst] - shares[worst]) <= ROUNDING, f"{numbers}; rate() may depend on the clock alone")


def _average_is_the_sum(case: Case) -> None:
    profile = expected(case, _ALL)
    shares = torch.tensor([profile.start, *profile.shares], dtype=torch.float64, device="cpu")
    model = _model(torch.float64)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for step in (0, *_ALL):
        _train(model, step)
        for name, parameter in model.named_parameters():
            seen[name].append(parameter.detach().clone())
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        averages = _run(case, _ALL, dtype, dtype=dtype).averages
        for name in seen.keys() & averages.keys():
            exact = torch.tensordot(shares, torch.stack(seen[name]), 1)
            error = float((averages[name].double() - exact).abs().max())
            numbers = f"{error:.1e} away from sum(share * weights); allowed {bound:.0e}"
            require(error <= bound, f"{name} in {dtype} is {numbers}")


def _constant_is_fixed(case: Case) -> None:
    model = _model(torch.float32)
    _train(model, 1)
    averager = average(model, case.strategy)
    for step in _ALL:
        averager.update(lr=case.lr(step))
    _same_bits(averager.averages, model.state_dict(), "after updates with constant weights", "the weights")


def _kernels_agree(case: Case) -> None:
    loop = _run(case, _ALL, kernel="loop").averages
    for kernel in ("foreach", "auto"):
        _same_bits(_run(case, _ALL, kernel=kernel).averages, loop, f"with kernel={kernel!r}", "kernel='loop'")


def _cadence_keeps_the_laws(case: Case) -> None:
    cadences: tuple[tuple[dict[str, Any], Profile], ...] = (
        ({"every": 3}, expected(case, range(3, UPDATES + 1, 3), stride=3)),
        ({"start": 10}, expected(case, range(10, UPDATES + 1), replaces=True)),
    )
    for options, wanted in cadences:
        profile = _run(case, _ALL, **options).profile()
        error = float(np.abs(profile.shares - wanted.shares).max()) if len(profile) == len(wanted) else math.inf
        numbers = f"{len(profile)} updates (expected {len(wanted)}), shares that differ by up to {error:.1e}"
        require(error <= ROUNDING, f"with {options}: {numbers}")


def _resume_is_exact(case: Case) -> None:
    whole, half = _run(case, _ALL), _run(case, _ALL[:_HALF])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    model = _model(torch.float32)
    strategy = type(case.strategy).model_validate(settings_of(case.strategy))
    resumed = average(model, strategy)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    _go_on(case, resumed, model, _ALL[_HALF:])
    require(resumed.rate == whole.rate, f"the last rate is {resumed.rate!r} after a resume and {whole.rate!r} without")
    _same_bits(resumed.averages, whole.averages, "after a resume", "the uninterrupted run")


def _config_survives(case: Case) -> None:
    strategy, cls = case.strategy, type(case.strategy)
    data = json.loads(json.dumps(settings_of(strategy)))
    again = cls.model_validate(data)
    require(again == strategy, f"JSON changes it: {strategy!r} came back as {again!r}")
    cls.model_json_schema()
    if registry().strategies().get(strategy.name) is cls:
        config = AveragerConfig(strategy=strategy)
        copy = AveragerConfig.model_validate_json(config.model_dump_json())
        require(copy == config, f"JSON changes the config: {config!r} came back as {copy!r}")
    try:
        cls.model_validate({**data, "no_such_setting": 1})
    except ValidationError:
        return
    message = "a misspelt setting is accepted; leave extra='forbid' as polyak.Strategy has it"
    raise AssertionError(message)


def _is_frozen(case: Case) -> None:
    frozen = type(case.strategy).model_config.get("frozen")
    require(frozen, "its settings can be changed; leave frozen=True as polyak.Strategy has it")
    try:
        same = hash(copy.deepcopy(case.strategy)) == hash(case.strategy)
    except ArgumentError as error:
        raise AssertionError(str(error)) from error
    require(
        same, f"a copy of {case.strategy!r} is equal and has another hash; its settings need hashes of their values"
    )


def _pickle_survives(case: Case) -> None:
    again = pickle.loads(pickle.dumps(case.strategy))  # noqa: S301 - made one expression earlier
    require(again == case.strategy, f"pickle changes it: {case.strategy!r} came back as {again!r}")
    require(copy.deepcopy(case.strategy) == case.strategy, f"deepcopy changes {case.strategy!r}")


LAWS: dict[str, Callable[[Case], None]] = {
    "law 1, rates and shares": rates_are_shares,
    "law 1, one-hot weights give the profile": _one_hot_is_the_profile,
    "laws 2 and 5, the average is sum(share * weights), tied tensors once": _average_is_the_sum,
    "law 3, constant weights are a fixed point": _constant_is_fixed,
    "law 4, kernels agree": _kernels_agree,
    "law 8, interrupted and resumed equals uninterrupted": _resume_is_exact,
    "cadence, every= and start=": _cadence_keeps_the_laws,
    "configs, settings survive JSON and misspelt ones are refused": _config_survives,
    "settings are frozen and have a hash": _is_frozen,
    "pickle and deepcopy": _pickle_survives,
}
"""Titles and laws; the first is the one that all others need."""


def _model(dtype: torch.dtype) -> nn.Module:
    """Return a model with a tied tensor and a batch norm, which averages get wrong most often."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        embedding, norm, head = nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    return nn.ModuleDict({"embedding": embedding, "norm": norm, "head": head}).to(dtype)


def _train(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            tensor.copy_(noise if tensor.is_floating_point() else torch.full_like(tensor, step))


def _run(case: Case, steps: Iterable[int], of: torch.dtype = torch.float32, **options: Any) -> Averager:
    model = _model(of)
    _train(model, 0)
    averager = average(model, case.strategy, **options)
    _go_on(case, averager, model, steps)
    return averager


def _go_on(case: Case, averager: Averager, model: nn.Module, steps: Iterable[int]) -> None:
    for step in steps:
        _train(model, step)
        averager.update(model, lr=case.lr(step))


def _same_bits(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str, what: str) -> None:
    for name in got.keys() & wanted.keys():
        error = float((got[name].double() - wanted[name].double()).abs().max())
        require(torch.equal(got[name], wanted[name]), f"{where}, {name} differs from {what} by up to {error:.1e}")
