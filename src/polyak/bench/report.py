"""What a run of the benchmark found, in a form that other programs read: rows, and what they were measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from polyak.errors import ConfigError
from polyak.io.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Quantiles", "Report", "Row"]


class Quantiles(BaseModel):
    """Where the samples lie: 5 %, a quarter, the middle, three quarters, 95 %, and how many there are."""

    model_config = ConfigDict(frozen=True)

    low: float
    first: float
    median: float
    third: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        """Return the quantiles of samples.

        Examples:
            >>> Quantiles.of([1.0, 2.0, 3.0]).median
            2.0
        """
        low, first, middle, third, high = np.quantile(samples, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
        return cls(low=low, first=first, median=middle, third=third, high=high, count=len(samples))

    def over(self, reference: float) -> Quantiles:
        """Return these as multiples of a reference."""
        places = {name: value / reference for name, value in self if name != "count"}
        return Quantiles(**places, count=self.count)


class Row(BaseModel):
    """One way of averaging in one case on one model.

    Attributes:
        case: The name of the case.
        model: The name of the model.
        setting: What else was set, in words.
        subject: Who was measured.
        group: The library; "limit" is not an average but a pass over as many bytes.
        milliseconds: The time of one call.
        ratio: That time over the reference's, round by round.
        reference: What ``ratio`` compares with.
        limit: The time divided by the faster pass's, round by round.
        share: The time divided by the time of the training step before it.
        peak: Bytes that the call needs for itself at its worst moment.
        kept: Bytes of what the call made.
        slowest: Milliseconds of the slowest of several ranks.
        weights: Bytes that the weights take on a rank.
        held: Bytes that the average takes on a rank.
        whole: Bytes that all of the average would take there.
        tensors: How many floating tensors the model has.
        values: How many values are in them.
        disturbed: The share of the samples in which threads had to wait for a processor; they do not count where the
            others are enough.
        remark: What a reader must know; where nothing was measured, why.
    """

    model_config = ConfigDict(frozen=True)

    case: str
    model: str
    setting: str = ""
    subject: str
    group: Literal["polyak", "library", "limit"]
    milliseconds: Quantiles | None = None
    ratio: Quantiles | None = None
    reference: str = ""
    limit: Quantiles | None = None
    share: Quantiles | None = None
    peak: int | None = None
    kept: int | None = None
    slowest: float | None = None
    weights: int | None = None
    held: int | None = None
    whole: int | None = None
    tensors: int = 0
    values: int = 0
    disturbed: float = 0.0
    remark: str = ""

    def within(self, setting: str) -> Row:
        """Return the same with what was set for all rows of a run."""
        return self.model_copy(update={"setting": setting}) if setting and not self.setting else self


class Report(BaseModel):
    """A whole run.

    Attributes:
        machine: The machine, in one line.
        memory: How memory was measured; "" where it could not be.
        versions: Distributions that took part.
        settings: What was asked for.
        rows: What was found.
        notes: What else a reader must know.
    """

    model_config = ConfigDict(frozen=True)

    machine: str
    memory: str
    versions: dict[str, str]
    settings: dict[str, str]
    rows: list[Row]
    notes: list[str] = []

    @classmethod
    def read(cls, file: Path) -> Report:
        """Return the report in a file that ``write`` wrote.

        Raises:
            ConfigError: If there is no result.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            message = f"{file} is no report of polyak bench ({reason}); write one with --json"
            raise ConfigError(message) from error

    def write(self, file: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        text = self.model_dump_json(indent=1) + "\n"
        write_whole(file, lambda scratch: scratch.write_text(text, encoding="utf-8"))
