"""The built-in strategies, one file per family; they come through the same hook as everyone else's."""

from __future__ import annotations

from polyak.strategies.blocks import BlockMean
from polyak.strategies.dema import DoubleEMA
from polyak.strategies.ema import EMA, DebiasedEMA
from polyak.strategies.halflife import HalfLifeEMA
from polyak.strategies.lawa import LAWA
from polyak.strategies.polynomial import PolynomialAveraging
from polyak.strategies.power import PowerEMA
from polyak.strategies.swa import SWA
from polyak.strategies.tail import TailAveraging
from polyak.strategies.tf import TFEMA
from polyak.strategies.timm import EMAV1, EMAV2, EMAV3

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
    "DebiasedEMA",
    "DoubleEMA",
    "HalfLifeEMA",
    "PolynomialAveraging",
    "PowerEMA",
    "TailAveraging",
]

BUILT_IN = (
    EMA, DebiasedEMA, EMAV1, EMAV2, EMAV3, SWA,
    HalfLifeEMA, TFEMA, PolynomialAveraging, PowerEMA, TailAveraging, LAWA, DoubleEMA, BlockMean,
)  # fmt: skip
"""All of them, in the order in which they are listed."""
