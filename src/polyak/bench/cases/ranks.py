"""One update on several ranks: real processes, a model that ``fully_shard`` spreads over them."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import torch

from polyak.bench.launch import Task, launched
from polyak.bench.models import size
from polyak.bench.report import Quantiles, Row
from polyak.io.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyak.bench.launch import Average
    from polyak.bench.models import Subject
    from polyak.bench.settings import Settings

__all__ = ["ranks"]


def ranks(subject: Subject, settings: Settings) -> list[Row]:
    """Return the time of an update on so many ranks, and what a rank keeps.

    The time is the median rank's: each quantile is the median over the ranks. The bytes come from the
    rank that keeps most.
    """
    counts, threads = settings.chosen_ranks(), torch.get_num_threads()
    share = settings.seconds / len(counts)
    found = {}
    for count in track(counts, f"ranks {subject.name}"):
        own = max(1, threads // count)
        task = Task(model=subject.name, ranks=count, threads=own, settings=settings.lasting(share))
        found[count] = launched(task)
    tensors, values = size(subject.model)
    rows = []
    for name in next(iter(found.values()))[0].averages:
        for count, on_ranks in found.items():
            averages = [one.averages[name] for one in on_ranks]
            reference = _middle([one.averages[name] for one in found[counts[0]]])
            rows.append(
                Row(
                    case="ranks", model=subject.name, setting=name, subject=_ranks(count), group="polyak",
                    milliseconds=_middle(averages), slowest=max(one.milliseconds.median for one in averages),
                    ratio=_middle(averages).over(reference.median), reference=_ranks(counts[0]),
                    weights=max(one.weights for one in on_ranks), held=max(one.held for one in averages),
                    whole=averages[0].whole, tensors=tensors, values=values,
                    disturbed=max(one.disturbed for one in averages), remark=_remark(count, threads, settings),
                )
            )  # fmt: skip
    return rows


def _middle(averages: Sequence[Average]) -> Quantiles:
    every = [one.milliseconds.model_dump() for one in averages]
    return Quantiles(**{key: median(one[key] for one in every) for key in every[0] if key != "count"},
                     count=min(one["count"] for one in every))  # fmt: skip


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _remark(count: int, threads: int, settings: Settings) -> str:
    own = max(1, threads // count)
    each = f"{own} thread{'s' if own > 1 else ''} each"
    there = settings.room
    return f"{each}, on {there} cores" if count > there else each
