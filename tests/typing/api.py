"""User code that must type-check under ``mypy --strict``: the public contract as its users see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, assert_type

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

import polyak
from polyak.tensors import Entry, policies, unwrap, walk


def build(model: nn.Module, settings: dict[str, Any]) -> list[polyak.Averager]:
    named: Mapping[str, Tensor] = dict(model.named_parameters())
    return [
        polyak.average(model),
        polyak.average(model, "ema", decay=0.999),
        polyak.average(model, polyak.EMA(decay=0.999), every=10, start=100, origin="first"),
        polyak.average(model, {"name": "swa"}, include="*.weight", exclude=["head.*"], match="order"),
        polyak.average(model, buffers={"*.running_*": "copy"}, device="cpu", dtype=torch.float64),
        polyak.average(model, device=torch.device("cpu"), dtype="bfloat16", nonfinite="raise", kernel="loop"),
        polyak.average(named),
        polyak.average(model.parameters(), dtype="model", rounding="nearest", seed=3),
        polyak.average(model, into=model),
        polyak.average(list(model.parameters()), into=list(model.parameters())),
        polyak.average(model, **settings),
        polyak.AveragerConfig(strategy=polyak.SWA(), every=2).build(model),
        polyak.AveragerConfig.from_file("average.toml").build(model),
        polyak.average(model, polyak.AveragerConfig(strategy=polyak.SWA()), dtype="float64"),
    ]


def train(averager: polyak.Averager, model: nn.Module, batch: Tensor) -> None:
    averager.update()
    averager.update(model)
    averager.update(model, step=3, lr=0.1)
    averager.update(model.parameters(), rate=0.5)
    with averager.applied():
        model(batch)
    with averager.applied(model):
        model(batch)
    averager.configure(decay=0.9, every=2)
    averager(batch, scale=2.0)
    assert_type(averager.module, nn.Module)
    averager.copy_to()
    averager.copy_to(model)
    averager.to("cpu", dtype=torch.float64)
    averager.pin_memory()
    averager.take_over(model, n=3)
    assert_type(averager.averaged_state_dict(), dict[str, Any])
    state = averager.state_dict()
    averager.load_state_dict(state)
    assert_type(averager.averages, Mapping[str, Tensor])
    assert_type(averager.n, int)
    assert_type(averager.rate, float | None)
    assert_type(averager.skipped, int)
    assert_type(averager.is_applied, bool)
    assert_type(averager.describe(), str)
    assert_type(averager.strategy, polyak.Strategy)


def several(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    averages = polyak.bank(
        model, {"short": {"name": "ema", "decay": 0.9}, "mean": polyak.SWA(), "long": "ema"}, every=2
    )
    assert_type(averages, polyak.Bank)
    assert_type(averages["short"], polyak.Averager)
    averages.update(step=3, lr=0.1)
    averages["short"].configure(decay=0.99)
    with averages.applied("long"):
        pass
    averages.load_state_dict(averages.state_dict())
    averager = polyak.average(model, capturable=True, nonfinite="propagate", kernel="fused")
    averager.advance(step=1)
    averager.synchronize()
    with polyak.attach(optimizer, averager) as attached:
        optimizer.step()
    attached.remove()
    polyak.attach([optimizer, torch.optim.SGD(model.parameters(), lr=0.1)], averager).remove()
    both: torch.optim.AdamW = polyak.optim.AdamW(model.parameters(), lr=1e-3, averager=averager)
    both.step()
    one = polyak.optim.AdamW(model.parameters(), averager=averager)
    assert_type(one.one_pass, bool)
    assert_type(one.describe(), str)
    assert_type(one.averager, polyak.Averager | polyak.Bank | None)


def look(averager: polyak.Averager) -> None:
    profile = averager.profile()
    assert_type(profile, polyak.Profile)
    shares: NDArray[Any] = profile.shares
    assert_type(profile.start, float)
    assert_type(profile.half_life, float)
    assert_type(profile.mean_age, float)
    polyak.Profile.of(polyak.EMAV3(use_warmup=True), 100, every=2)
    print(shares.sum())  # noqa: T201 - uses the value


def choose() -> list[polyak.Strategy]:
    found = polyak.convert(polyak.EMA(decay=0.999), "power", steps=10_000, every=2, to_every=10)
    assert_type(found, polyak.Conversion)
    assert_type(found.strategy, polyak.Strategy)
    assert_type(found.distance, float)
    assert_type(found.profile, polyak.Profile)
    polyak.convert({"name": "ema", "decay": 0.9}, polyak.LAWA, steps=100)
    power = polyak.PowerEMA(sigma_rel=0.05)
    assert_type(power.exponent, float)
    assert_type(power.width, float)
    half = polyak.HalfLifeEMA(halflife=2e6, unit="samples", batch_size=256)
    assert_type(half.in_steps, float)
    return [
        polyak.TFEMA(decay=0.99, follow=1),
        polyak.PolynomialAveraging(eta=8),
        polyak.PowerEMA(gamma=6.94),
        polyak.TailAveraging(fraction=0.25, total_steps=1000),
        polyak.LAWA(window=5),
        polyak.DoubleEMA(decay=0.99),
        polyak.BlockMean(length=100),
    ]


def keep(averager: polyak.Averager, batches: list[Tensor]) -> None:
    polyak.save(averager, "average.safetensors")
    polyak.load(averager, "average.safetensors")
    polyak.recalibrate(averager, batches)
    polyak.recalibrate(averager, batches, forward=lambda module, batch: module(batch))


class Root(polyak.Strategy):
    """A horizon that grows like a power of the run: ``rate = n ** -power``."""

    name: Literal["root"] = "root"
    power: Annotated[float, Field(gt=0, le=1)] = 0.5

    def rate(self, clock: polyak.Clock) -> float:
        return float(clock.n**-self.power)

    def engine(self) -> Mapping[str, Any]:
        return {"origin": "first"}


class ByRate(polyak.Strategy):
    """Shares in proportion to the learning rate."""

    name: Literal["by_rate"] = "by_rate"

    def weight(self, clock: polyak.Clock) -> float:
        return clock.lr or 0.0

    def rate(self, clock: polyak.Clock) -> float:
        weight = self.weight(clock)
        return weight / (clock.mass + weight)


@polyak.hookimpl
def polyak_strategies() -> list[type[polyak.Strategy]]:
    """Offer the strategies above."""
    return [Root, ByRate]


@polyak.hookimpl
def polyak_updated(averager: polyak.Averager, clock: polyak.Clock) -> None:
    """Look at an update."""
    print(clock.n, clock.step, clock.stride, clock.elapsed, averager.rate)  # noqa: T201 - shows the values


def names(model: nn.Module) -> dict[str, str]:
    entries: list[Entry] = walk(model)
    chosen = policies(entries, buffers="auto", exclude="*.bias")
    assert_type(unwrap(model), nn.Module)
    offered: Mapping[str, type[polyak.Strategy]] = polyak.strategies()
    print(list(offered))  # noqa: T201 - shows the values
    return {entry.name: policy for entry, policy in zip(entries, chosen, strict=True)}


def failing(model: nn.Module) -> str:
    try:
        polyak.average(model, "emma")
    except polyak.UnknownStrategyError as error:
        return str(error)
    except (polyak.ConfigError, polyak.ModelError, polyak.MismatchError, polyak.StateError) as error:
        return str(error)
    except polyak.PolyakError as error:
        return str(error)
    return ""
