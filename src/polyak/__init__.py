"""Weight averaging for PyTorch: every strategy, one interface, chosen before the run or after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak import distributed, optim, posthoc  # noqa: F401 - polyak.distributed.save(), without another import
from polyak.attach import attach
from polyak.averager import Averager
from polyak.bank import Bank
from polyak.checkpoints import load, save
from polyak.clock import Clock
from polyak.config import AveragerConfig
from polyak.convert import Conversion, convert
from polyak.errors import (
    AppliedError,
    ArgumentError,
    AttributeAccessError,
    ConfigError,
    DistributedError,
    FrozenError,
    MismatchError,
    MissingExtraError,
    MissingFileError,
    ModelError,
    NonFiniteError,
    PluginError,
    PolyakError,
    PolyakWarning,
    RateError,
    SnapshotError,
    StateError,
    UnboundError,
    UnknownAverageError,
    UnknownStrategyError,
    WriteError,
)
from polyak.factory import average, bank
from polyak.habits import package_hint
from polyak.hookspecs import hookimpl
from polyak.profile import Profile
from polyak.recalibrate import recalibrate
from polyak.recursion import Shares
from polyak.registry import strategies
from polyak.strategies import (
    EMA,
    EMAV1,
    EMAV2,
    EMAV3,
    LAWA,
    SWA,
    TFEMA,
    BlockMean,
    DebiasedEMA,
    DoubleEMA,
    HalfLifeEMA,
    PolynomialAveraging,
    PowerEMA,
    TailAveraging,
)
from polyak.strategy import Move, Strategy

__all__ = [
    "EMA",
    "EMAV1",
    "EMAV2",
    "EMAV3",
    "LAWA",
    "SWA",
    "TFEMA",
    "AppliedError",
    "ArgumentError",
    "AttributeAccessError",
    "Averager",
    "AveragerConfig",
    "Bank",
    "BlockMean",
    "Clock",
    "ConfigError",
    "Conversion",
    "DebiasedEMA",
    "DistributedError",
    "DoubleEMA",
    "FrozenError",
    "HalfLifeEMA",
    "MismatchError",
    "MissingExtraError",
    "MissingFileError",
    "ModelError",
    "Move",
    "NonFiniteError",
    "PluginError",
    "PolyakError",
    "PolyakWarning",
    "PolynomialAveraging",
    "PowerEMA",
    "Profile",
    "RateError",
    "Shares",
    "SnapshotError",
    "StateError",
    "Strategy",
    "TailAveraging",
    "UnboundError",
    "UnknownAverageError",
    "UnknownStrategyError",
    "WriteError",
    "attach",
    "average",
    "bank",
    "convert",
    "hookimpl",
    "load",
    "posthoc",
    "recalibrate",
    "save",
    "strategies",
]

__version__ = "0.1.0"


if not TYPE_CHECKING:  # type checkers know the names

    def __getattr__(name: str) -> Any:  # noqa: ANN401 - it only raises
        message = f"polyak has no attribute {name!r}.{package_hint(name)}"
        raise AttributeAccessError(message)
