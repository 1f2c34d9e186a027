"""Weight averaging for PyTorch: every strategy, one interface, chosen before the run or after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak import distributed, errors, files, optim, posthoc
from polyak.checkpoints import load, save
from polyak.config import AveragerConfig
from polyak.config.factory import average, bank
from polyak.engine import Averager, Bank
from polyak.engine.batch_norm.recalibrate import recalibrate

# Also public, for programs that go further; "X as X" is how a re-export is spelled for type checkers.
from polyak.errors import (
    AppliedError as AppliedError,
    ArgumentError as ArgumentError,
    AttributeAccessError as AttributeAccessError,
    ConfigError as ConfigError,
    DistributedError as DistributedError,
    FrozenError as FrozenError,
    MismatchError as MismatchError,
    MissingExtraError as MissingExtraError,
    MissingFileError as MissingFileError,
    ModelError as ModelError,
    NonFiniteError as NonFiniteError,
    PluginError as PluginError,
    PolyakError,
    PolyakWarning,
    RateError as RateError,
    SnapshotError as SnapshotError,
    StateError as StateError,
    UnboundError as UnboundError,
    UnknownAverageError as UnknownAverageError,
    UnknownMergeError as UnknownMergeError,
    UnknownStrategyError as UnknownStrategyError,
    WriteError as WriteError,
)
from polyak.errors.hints import package_hint
from polyak.optim.attach import attach
from polyak.planning.convert import Conversion as Conversion, convert
from polyak.registry import strategies
from polyak.registry.hookspecs import hookimpl
from polyak.strategy import (
    EMA,
    EMAV1 as EMAV1,
    EMAV2 as EMAV2,
    EMAV3,
    LAWA,
    SWA,
    TFEMA as TFEMA,
    BlockMean as BlockMean,
    Clock,
    DebiasedEMA,
    DoubleEMA as DoubleEMA,
    HalfLifeEMA,
    Move as Move,
    PolynomialAveraging as PolynomialAveraging,
    PowerEMA,
    Profile,
    Shares as Shares,
    Strategy,
    TailAveraging as TailAveraging,
)

__all__ = [
    "EMA",
    "EMAV3",
    "LAWA",
    "SWA",
    "Averager",
    "AveragerConfig",
    "Bank",
    "Clock",
    "DebiasedEMA",
    "HalfLifeEMA",
    "PolyakError",
    "PolyakWarning",
    "PowerEMA",
    "Profile",
    "Strategy",
    "attach",
    "average",
    "bank",
    "convert",
    "distributed",
    "errors",
    "files",
    "hookimpl",
    "load",
    "optim",
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
