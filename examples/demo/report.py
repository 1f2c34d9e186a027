"""What the demo shows: one table for each schedule of the learning rate, and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, median, stdev

import later
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from demo.afterwards import Afterwards
from demo.contenders import Contender
from demo.training import LEARNING_RATE, RAW, Run, Trace
from polyak import Profile, plot

CROWD = 10  # lines that one picture can hold apart
SAME = 0.01  # the part of an average that is seen


def table(schedule: str, runs: Sequence[Run], contenders: Sequence[Contender]) -> Table:
    """Return one row for the raw weights and one for each contender."""
    title = f"\n{schedule} learning rate {LEARNING_RATE}: test of {len(runs)} seed{'s' * (len(runs) > 1)}"
    made = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    made.add_column("weights", no_wrap=True)
    made.add_column("settings", overflow="fold")
    for heading in ("accuracy %", "loss", "vs raw (seeds)", "ms per update"):
        made.add_column(heading, justify="right", no_wrap=heading.endswith(("%", "loss")))
    raw = [run.traces[RAW] for run in runs]
    step = median(second for trace in raw for second in trace.seconds)
    made.add_row(RAW, "SGD, momentum", *_figures(raw), "", f"{1e3 * step:.2f} (step)")
    made.add_section()
    for contender in contenders:
        traces = [run.traces[contender.label] for run in runs]
        if problem := next((trace.problem for trace in traces if trace.problem), ""):
            made.add_row(contender.label, escape(problem), *["-"] * 4, style="dim")
            continue
        cost = _cost([second for trace in traces for second in trace.seconds], step)
        made.add_row(contender.label, escape(contender.settings), *_figures(traces), _versus(traces, raw), cost)
    return made


def picture(runs: Mapping[str, Sequence[Run]], contenders: Sequence[Contender], chosen: Afterwards, path: Path) -> None:
    """Draw the test losses over the run, the shares of past steps and the sweep; the file is whole or absent."""
    first = next(iter(runs.values()))
    traces = first[0].traces
    shown = [c.label for c in contenders if not traces[c.label].problem]
    profiles = {label: profile for label in shown if (profile := traces[label].profile)}
    if len(shown) > CROWD:
        shown = [label for label in shown if label in _unlike(profiles)]
    looks = plot.palette(shown) | {RAW: {"color": "0.55", "linewidth": 3.5}}
    losses = {
        schedule: {label: _mean_losses(made, label) for label in [RAW, *shown]} for schedule, made in runs.items()
    }
    every = [loss for lines in losses.values() for line in lines.values() for loss in line if isfinite(loss)]
    figure = Figure(figsize=(12, 9), dpi=130, layout="constrained")
    grid = figure.add_gridspec(len(runs), 2, width_ratios=(1.3, 1))
    for row, (schedule, lines) in enumerate(losses.items()):
        ax = figure.add_subplot(grid[row, 0], ylim=(0.8 * min(every), 1.2 * max(every)))
        plot.curves({label: (first[0].steps, line) for label, line in lines.items()}, ax, looks=looks)
        ax.set(title=f"{schedule} learning rate, mean of {len(first)} seed{'s' * (len(first) > 1)}", ylabel="test loss")
    ax = plot.shares(profiles, figure.add_subplot(grid[0, 1]), scale="linear", looks=looks)
    ax.set(title=f"what each past step counts at the end\n({next(iter(runs))} learning rate)")
    ax.legend(frameon=False, fontsize=7.5, ncols=2)
    later.draw(
        chosen.found,
        chosen.raw,
        figure.add_subplot(grid[1, 1]),
        title="averages made after one recorded run\n(constant learning rate)",
    )
    for ax in figure.axes:
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Handwritten digits: the weights of a run, and averages of the same weights", weight="bold")
    _save(figure, path)


def overview(runs: Mapping[str, Sequence[Run]], chosen: Afterwards, path: Path) -> None:
    """Draw two averages over the first schedule and the sweep, small enough for the top of a page."""
    schedule, made = next(iter(runs.items()))
    shown = [label for label in (RAW, "ema", "swa") if label in made[0].traces]
    looks = plot.palette(shown) | {RAW: {"color": "0.55", "linewidth": 3}}
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = {label: _mean_losses(made, label) for label in shown}
    best = min(map(min, losses.values()))
    left.set_ylim(0.5 * best, 6 * best)  # the first epochs are far above
    plot.curves({label: (made[0].steps, line) for label, line in losses.items()}, left, looks=looks)
    left.set(title=f"While it trains: {schedule} learning rate, mean of {len(made)} seeds", ylabel="test loss")
    later.draw(chosen.found, chosen.raw, right, title="Afterwards: averages made from the files of one run")
    for ax in figure.axes:
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _unlike(profiles: Mapping[str, Profile]) -> list[str]:
    """Return the labels of averages that differ at the end; the first of those that do not."""
    found: list[str] = []
    for label, profile in profiles.items():
        if all(profile.distance(profiles[other]) > SAME for other in found):
            found.append(label)
    return found


def _mean_losses(runs: Sequence[Run], label: str) -> list[float]:
    return [fmean(losses) for losses in zip(*(run.traces[label].losses for run in runs), strict=True)]


def _save(figure: Figure, path: Path) -> None:
    scratch = path.with_name(path.name + ".part")
    try:
        figure.savefig(scratch, format=path.suffix[1:].lower())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _figures(traces: Sequence[Trace]) -> tuple[str, str]:
    accuracies, losses = [trace.accuracy for trace in traces], [trace.losses[-1] for trace in traces]
    return _spread(accuracies, 1), _spread(losses, 3)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def _versus(traces: Sequence[Trace], raw: Sequence[Trace]) -> str:
    pairs = [(trace.losses[-1], other.losses[-1]) for trace, other in zip(traces, raw, strict=True)]
    change = fmean(a for a, _ in pairs) / fmean(b for _, b in pairs) - 1.0
    wins = sum(a < b for a, b in pairs)
    color = "green" if change < 0 else "red"
    return f"[{color}]{round(100 * change):+d} % ({wins}/{len(pairs)})[/]"


def _cost(seconds: Sequence[float], step: float) -> str:
    return f"{1e3 * median(seconds):.2f} ({median(seconds) / step:3.0%})" if seconds else "-"
