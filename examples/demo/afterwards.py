"""The end of the demo: the best average that could have been chosen, from one recorded run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import later
import torch
from later import KEPT, RAW, SYNTHESISED
from rich.table import Table
from torch.nn import functional as F  # noqa: N812 - its usual name

import polyak
from demo.training import Digits, network, steps
from polyak.posthoc import Recorder, Sweep

PARTS = (0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
SNAPSHOTS = 150
DEFAULT = "EMA, decay 0.999 (a default)"


@dataclass(frozen=True)
class Afterwards:
    """What was found.

    Attributes:
        found: The sweep.
        raw: The validation loss of the raw weights.
        table: The best average beside the others.
        words: What was done, in words.
        notes: How good the synthesis was, in words.
    """

    found: Sweep
    raw: float
    table: Table
    words: str
    notes: str


def afterwards(digits: Digits, *, seed: int, epochs: int, tick: Callable[[], None]) -> Afterwards:
    """Record one run, choose an average by digits that it was not trained on, and test it beside the real one."""
    learnt = digits.choosing()
    total = epochs * learnt.batches
    every = max(1, total // SNAPSHOTS)
    targets = later.grid(total, PARTS)
    torch.manual_seed(seed)
    model = network()
    blocks = polyak.average(model, "block_mean", length=every)
    # Nobody has to keep these: they are here to see whether what is synthesised is right.
    kept = polyak.bank(model, {**targets, DEFAULT: {"name": "ema", "decay": 0.999}})
    with TemporaryDirectory() as folder:
        with Recorder(blocks, folder, every=every):
            for _ in steps(learnt, model, schedule="constant", epochs=epochs):
                blocks.update()
                kept.update()
                tick()
        found = polyak.posthoc.sweep(folder, lambda state: _loss(state, learnt), targets)
        files = [path.stat().st_size for path in Path(folder).iterdir() if path != found.file]
    weights = {
        RAW: model.state_dict(),
        DEFAULT: kept[DEFAULT].averaged_state_dict(),
        SYNTHESISED: found.synthesis.state_dict,
        KEPT: kept[found.best.label].averaged_state_dict(),
    }
    losses = {"validation loss": lambda s: _loss(s, learnt), "test loss": lambda s: _loss(s, digits)}
    words = (
        f"One more run of {total} steps at the constant learning rate was recorded: {len(files)} files, each the mean "
        f"of {every} steps, {sum(files) / 1e6:.1f} MB. It was trained without {len(learnt.test_labels)} of the "
        f"{len(digits.labels)} digits, which are for validation. {len(targets)} averages were made from the files "
        "afterwards, and the best was chosen by the validation loss. The test digits had no part in it."
    )
    notes = (
        f"The best is an {found.best.label}, corrected for its start. The synthesised profile is "
        f"{found.synthesis.profile_error:.1%} off the wanted one; the coefficients of the files have "
        f"Σ|x| = {found.synthesis.amplification:.2f}."
    )
    table = later.comparison(weights, model, losses)
    return Afterwards(found, _loss(weights[RAW], learnt), table, words, notes)


@torch.no_grad()
def _loss(state: later.State, digits: Digits) -> float:
    model = network().eval()
    model.load_state_dict(state)
    return F.cross_entropy(model(digits.test_images), digits.test_labels).item()
