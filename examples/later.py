"""Choosing an average after the run, for the examples: what is tried, and the best beside what was really kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from rich import box
from rich.table import Table
from torch import Tensor, nn

from polyak.posthoc import Sweep

RAW, SYNTHESISED, KEPT = "the last weights", "best, synthesised", "best, really kept"
State = Mapping[str, Tensor]


def grid(total: int, parts: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """Return EMAs, corrected for their start, whose decays have these half-lives, as parts of ``total`` steps."""
    rates = [float(f"{1 - 0.5 ** (1 / (part * total)):.2g}") for part in parts if part * total >= 1]
    decays = [float(f"{1 - rate:.6g}") for rate in rates]
    return {f"EMA, decay {decay}": {"name": "ema_debiased", "decay": decay} for decay in decays}


def distance(one: State, other: State, model: nn.Module) -> float:
    """Return how far one set of weights is from another: ``||one - other|| / ||other||``, over all parameters."""
    names = [name for name, _ in model.named_parameters()]  # tied weights have one name here, and buffers none
    mine, theirs = (torch.cat([state[name].double().flatten() for name in names]) for state in (one, other))
    return float(torch.linalg.vector_norm(mine - theirs) / torch.linalg.vector_norm(theirs))


def comparison(weights: Mapping[str, State], model: nn.Module, losses: Mapping[str, Callable[[State], float]]) -> Table:
    """Return one row for each set of weights: its losses, and how far it is from the average that was really kept."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("weights", no_wrap=True)
    for heading in (*losses, "distance from the one really kept"):
        table.add_column(heading, justify="right")
    for label, state in weights.items():
        figures = [f"{loss(state):.5f}" for loss in losses.values()]
        table.add_row(label, *figures, f"{distance(state, weights[KEPT], model):.2g}", style=_style(label))
    return table


def draw(found: Sweep, raw: float, ax: Axes, *, title: str) -> None:
    """Draw the validation loss of what was tried, and a line for the last weights."""
    found.plot(ax, label="validation loss")
    ax.lines[0].set_label("averages made after the run")
    ax.axhline(raw, color="0.55", linewidth=2, linestyle="--", label="the last weights, not averaged", zorder=1)
    ax.set_title(title)
    ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    ax.legend(frameon=False)


def _style(label: str) -> str:
    return "bold" if label in {SYNTHESISED, KEPT} else ""
