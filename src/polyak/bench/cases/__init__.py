"""What can be measured, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from polyak.bench.cases.adamw import adamw
from polyak.bench.cases.bank import bank
from polyak.bench.cases.construction import construction
from polyak.bench.cases.host import host
from polyak.bench.cases.precision import precision
from polyak.bench.cases.ranks import ranks
from polyak.bench.cases.scaling import scaling
from polyak.bench.cases.step import step
from polyak.bench.cases.update import update

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.bench.models import Subject
    from polyak.bench.report import Row
    from polyak.bench.settings import Settings

__all__ = ["CASES", "Case"]


class Case(NamedTuple):
    """One question.

    Attributes:
        run: Measures it on a model.
        title: What is measured, in words.
        alone: Whether it makes its own models; then it is run once, on None.
    """

    run: Callable[..., list[Row]]
    title: str
    alone: bool = False

    def on(self, subject: Subject | None, settings: Settings) -> list[Row]:
        """Return the rows of a model."""
        return self.run(settings) if subject is None else self.run(subject, settings)


CASES: dict[str, Case] = {
    "update": Case(update, "One update of an average"),
    "construction": Case(construction, "Making an average"),
    "host": Case(host, "The host's work in one update, kernels switched off"),
    "precision": Case(precision, "One update with other dtypes"),
    "bank": Case(bank, "One update of several averages of one model"),
    "adamw": Case(adamw, "A step of AdamW with one update of an average"),
    "scaling": Case(scaling, "One update of models that grow", alone=True),
    "step": Case(step, "One update after each training step"),
    "ranks": Case(ranks, "One update on several ranks, each of its own shards"),
}
"""Names to cases."""
