"""Pickles of earlier versions, which name modules by the paths that these had then."""

from __future__ import annotations

import importlib
import sys

__all__ = ["answer_to_former_names"]

_FORMER = {
    "polyak.bank": "polyak.engine.bank",
    "polyak.clock": "polyak.strategy.clock",
    "polyak.frozen": "polyak.strategy.frozen",
    "polyak.options": "polyak.engine.options",
    "polyak.profile": "polyak.strategy.profile",
    "polyak.strategies": "polyak.strategy",
    "polyak.strategies.blocks": "polyak.strategy.block_mean",
    "polyak.strategies.dema": "polyak.strategy.double_ema",
    "polyak.strategies.ema": "polyak.strategy.ema",
    "polyak.strategies.halflife": "polyak.strategy.halflife",
    "polyak.strategies.lawa": "polyak.strategy.lawa",
    "polyak.strategies.polynomial": "polyak.strategy.polynomial",
    "polyak.strategies.power": "polyak.strategy.power",
    "polyak.strategies.swa": "polyak.strategy.swa",
    "polyak.strategies.tail": "polyak.strategy.tail",
    "polyak.strategies.tf": "polyak.strategy.tf",
    "polyak.strategies.timm": "polyak.strategy.timm",
}


def answer_to_former_names() -> None:
    """Register each moved module under the name that pickles of format 1 hold."""
    for former, present in _FORMER.items():
        sys.modules.setdefault(former, importlib.import_module(present))
