"""Run cases on models, one after the other; what was measured stays where a run is interrupted."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from polyak.bench.cases import CASES
from polyak.bench.entrants import entrants
from polyak.bench.machine import machine, versions
from polyak.bench.memory import method
from polyak.bench.models import build
from polyak.bench.report import Report, Row
from polyak.bench.settings import Settings, checked
from polyak.errors.formatting import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["measure"]


def measure(cases: Sequence[str] = ("update",), settings: Settings | None = None) -> Report:
    """Run cases and return a report. After Ctrl-C it has the models that were done, and a note.

    Args:
        cases: Names of ``CASES``.
        settings: On what, and for how long.

    Raises:
        ConfigError: If a name is unknown, or a model cannot be made.
        MissingExtraError: If a model or a library needs a package that is not installed.
    """
    settings = settings or Settings()
    for name in cases:
        checked("case", name, CASES)
    entrants(settings)  # a library that is missing is said before anything is measured
    before = torch.get_num_threads()
    rows: list[Row] = []
    notes: list[str] = []
    computer = machine(settings.place)
    try:
        for case in dict.fromkeys(cases):
            for model in ("",) if CASES[case].alone else dict.fromkeys(settings.models):
                chosen = settings.chosen_threads(case)
                for threads in chosen:
                    torch.set_num_threads(threads)
                    setting = counted(threads, "thread") if len(chosen) > 1 else ""
                    rows += [row.within(setting) for row in _one(case, model, settings)]
                    gc.collect()
                    torch.set_num_threads(before)
    except KeyboardInterrupt:
        notes.append("Interrupted: what was measured until then is shown.")
    finally:
        torch.set_num_threads(before)
    asked = {key: str(value) for key, value in vars(settings).items()}
    return Report(
        machine=computer, memory=method(settings.place), versions=versions(), settings=asked, rows=rows, notes=notes
    )


def _one(case: str, model: str, settings: Settings) -> list[Row]:
    """Return the rows of one case on one model, which is freed afterwards."""
    return CASES[case].on(build(model, settings.place) if model else None, settings)
