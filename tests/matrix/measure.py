"""Run one strategy on one architecture and fill its row: the sum of shares in float64, then every library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .architectures import build, shake, tied_names
from .cell import AT_ODDS, EXACT, Cell, needed, settled
from .entrants import DEFAULTS, Entrants, key, learning_rate
from .exact import Exact, furthest
from .race import race
from .subjects import REFERENCES

if TYPE_CHECKING:
    from .subjects import Setup


def measure(strategy: str, architecture: str, steps: int) -> list[Cell]:
    """Return the cells of one strategy on one architecture.

    All averages follow the same ``steps`` noisy steps; then they are compared, and each library races polyak.
    """
    if missing := needed(strategy):
        remark = f"needs {', '.join(missing)}"
        return [Cell(strategy, architecture, reference, remark=remark) for reference in REFERENCES]
    model, chosen = build(architecture), settled(strategy)
    exact = Exact(model, chosen, [*map(learning_rate, range(1, steps + 1))])
    entrants = Entrants(model, chosen)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        shake(model, generator)
        exact.update()
        for update in entrants.updates.values():
            update()
    tied = tied_names(model)

    def cell(reference: str, setup: Setup | str) -> Cell:
        if isinstance(setup, str):
            return Cell(strategy, architecture, reference, remark=setup)
        error, where = differences[reference]
        twice = error > AT_ODDS and where in tied
        remark = "tied twice" if twice else "no buffers" if entrants.unbuffered(reference) else ""
        factor, milliseconds = race(entrants.updates[reference], entrants.updates[key(setup.ours)])
        return Cell(strategy, architecture, reference, error, factor, milliseconds, remark)

    # Everything is compared before anything races on.
    error, _ = furthest(exact.averages, entrants.ours(DEFAULTS))
    able = {name: setup for name, setup in entrants.setups.items() if not isinstance(setup, str)}
    differences = {name: furthest(entrants.theirs(name), entrants.ours(setup.ours)) for name, setup in able.items()}
    first = Cell(strategy, architecture, EXACT, error)
    return [first, *(cell(reference, setup) for reference, setup in entrants.setups.items())]
