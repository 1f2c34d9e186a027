"""What averaging costs on this machine: every kernel against other libraries and against the limit of the memory.

The command ``polyak bench`` is the usual way in.

Examples:
    >>> from polyak.bench import CASES, MODELS
    >>> list(CASES)
    ['update', 'construction', 'host', 'precision', 'bank', 'adamw', 'scaling', 'step', 'ranks']
    >>> "resnet50" in MODELS
    True
"""

from __future__ import annotations

from polyak.bench.cases import CASES
from polyak.bench.models import MODELS
from polyak.bench.report import Report, Row
from polyak.bench.run import measure
from polyak.bench.settings import Settings

__all__ = ["CASES", "MODELS", "Report", "Row", "Settings", "measure"]
