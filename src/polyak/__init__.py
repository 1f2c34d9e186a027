"""Weight averaging for PyTorch: every strategy, one interface, chosen before the run or after it."""

from __future__ import annotations

from polyak.attach import attach
from polyak.averager import Averager
from polyak.bank import Bank
from polyak.checkpoints import load, save
from polyak.clock import Clock
from polyak.config import AveragerConfig
from polyak.errors import (
    AppliedError,
    ConfigError,
    MismatchError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    PluginError,
    PolyakError,
    PolyakWarning,
    RateError,
    StateError,
    UnboundError,
    UnknownStrategyError,
)
from polyak.factory import average, bank
from polyak.hookspecs import hookimpl
from polyak.profile import Profile
from polyak.recalibrate import recalibrate
from polyak.registry import strategies
from polyak.strategies import EMA, EMAV1, EMAV2, EMAV3, SWA, DebiasedEMA
from polyak.strategy import Strategy

__all__ = [
    "EMA",
    "EMAV1",
    "EMAV2",
    "EMAV3",
    "SWA",
    "AppliedError",
    "Averager",
    "AveragerConfig",
    "Bank",
    "Clock",
    "ConfigError",
    "DebiasedEMA",
    "MismatchError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "PluginError",
    "PolyakError",
    "PolyakWarning",
    "Profile",
    "RateError",
    "StateError",
    "Strategy",
    "UnboundError",
    "UnknownStrategyError",
    "attach",
    "average",
    "bank",
    "hookimpl",
    "load",
    "recalibrate",
    "save",
    "strategies",
]

__version__ = "0.1.0"
