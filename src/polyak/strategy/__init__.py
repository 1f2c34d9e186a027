"""Strategies: what one is, and the built-in ones, one file per family."""

from __future__ import annotations

from polyak.strategy.base import Move, Strategy
from polyak.strategy.block_mean import BlockMean
from polyak.strategy.clock import Clock
from polyak.strategy.double_ema import DoubleEMA
from polyak.strategy.ema import EMA, DebiasedEMA
from polyak.strategy.halflife import HalfLifeEMA
from polyak.strategy.lawa import LAWA
from polyak.strategy.polynomial import PolynomialAveraging
from polyak.strategy.power import PowerEMA
from polyak.strategy.profile import Profile
from polyak.strategy.shares import Shares
from polyak.strategy.swa import SWA
from polyak.strategy.tail import TailAveraging
from polyak.strategy.tf import TFEMA
from polyak.strategy.timm import EMAV1, EMAV2, EMAV3

__all__ = [
    "BUILT_IN",
    "EMA",
    "EMAV1",
    "EMAV2",
    "EMAV3",
    "LAWA",
    "SWA",
    "TFEMA",
    "BlockMean",
    "Clock",
    "DebiasedEMA",
    "DoubleEMA",
    "HalfLifeEMA",
    "Move",
    "PolynomialAveraging",
    "PowerEMA",
    "Profile",
    "Shares",
    "Strategy",
    "TailAveraging",
]

BUILT_IN = (
    EMA, DebiasedEMA, EMAV1, EMAV2, EMAV3, SWA,
    HalfLifeEMA, TFEMA, PolynomialAveraging, PowerEMA, TailAveraging, LAWA, DoubleEMA, BlockMean,
)  # fmt: skip
"""All of them, in the order in which they are listed."""
