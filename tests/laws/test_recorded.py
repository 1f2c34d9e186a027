"""Whatever was recorded is synthesised to the bit by its own strategy and settings, after every way of holding it."""

from __future__ import annotations

import tempfile
import warnings
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import event, given, settings, strategies as st

import polyak
from oracle import strategies_to_try
from polyak.posthoc import Recorder, synthesize
from polyak.testing.rates import learning_rate
from posthoc.runs import killed

TRIED = strategies_to_try()
SHORT = {"name": "ema", "decay": 0.5}
EXACT = 1e-11  # of the profile: the shares of two ways to compute one recursion


class Resume(NamedTuple):
    """A process that ends, and another one that goes on."""

    before: int  # which update
    is_killed: bool  # or closes its recorder
    knows_blocks: bool  # has the recorder's state
    into: str  # what the state is loaded into


class Run(NamedTuple):
    """How a run is held."""

    first: int  # its first step
    gaps: list[int]  # from one step to the next
    scale: int  # what one step counts: 1, or its samples
    is_given: bool  # whether update() is told the step
    cadence: dict[str, Any]
    nan: set[int]  # updates whose weights are not finite
    resumes: list[Resume]
    snapshots: int  # the steps from one snapshot to the next
    blocks: bool

    @property
    def steps(self) -> list[int]:
        return [self.scale * step for step in accumulate(self.gaps, initial=self.first)]


@st.composite
def runs(draw):
    n = draw(st.integers(4, 16))
    is_given = draw(st.booleans())
    gaps = st.lists(st.integers(1, 5), min_size=n, max_size=n)
    kinds = ["again", "bank", "wider", *(["more", "fewer"] if is_given else [])]  # a new average would count from 1
    resumes = st.builds(Resume, st.integers(1, n), st.booleans(), st.booleans(), st.sampled_from(kinds))
    return Run(
        first=draw(st.sampled_from([0, 1, 3, 5001])) if is_given else 1,
        gaps=draw(gaps) if is_given and draw(st.booleans()) else [1] * n,
        scale=draw(st.sampled_from([1, 256, 2**20, 2**40])) if is_given else 1,
        is_given=is_given,
        cadence=draw(st.sampled_from([{}, {"every": 2}, {"every": 5}, {"start": 3}, {"start": 4, "every": 3}])),
        nan=draw(st.sets(st.integers(1, n - 1), max_size=3)),
        resumes=sorted(draw(st.lists(resumes, max_size=2, unique_by=lambda one: one.before))),
        snapshots=draw(st.integers(2, 9)),
        blocks=draw(st.booleans()),
    )


def held(run, folder, name, own):
    """Record a run; return the average that was recorded, and its updates when a process was killed last."""
    lost_at = 0
    generator = torch.Generator().manual_seed(0)
    model = {"w": torch.randn(5, generator=generator)}
    config = {"strategy": {"name": name, **{k: v for k, v in own.items() if k != "origin"}}, **run.cadence}
    if "origin" in own:
        config["origin"] = own["origin"]
    made = polyak.average(model, **config, dtype="float32")
    whole = made
    recording = {"directory": folder, "every": run.scale * run.snapshots, "blocks": run.blocks, "dtype": "float64"}
    recorder = Recorder(whole, **recording)
    for i, step in enumerate(run.steps):
        for resume in run.resumes:
            if resume.before == i:
                saved, blocks = made.state_dict(), recorder.state_dict()
                also = [one.state_dict() for key, one in getattr(whole, "items", dict)() if key != "average"]
                killed(recorder) if resume.is_killed else recorder.close()
                model = {"w": model["w"].clone()}
                whole = made = polyak.average(model, **config, dtype="float64" if resume.into == "wider" else "float32")
                if resume.into in {"bank", "more"}:
                    more = also or resume.into == "more"
                    whole = polyak.bank(model, {"average": config, **({"short": SHORT} if more else {})})
                    made = whole["average"]
                    for state in also:
                        whole["short"].load_state_dict(state)
                made.load_state_dict(saved)
                if resume.is_killed:
                    lost_at = made.n
                recorder = Recorder(whole, **recording)
                if resume.knows_blocks:
                    recorder.load_state_dict(blocks)
        model["w"].add_(torch.randn(5, generator=generator))
        kept = model["w"].clone()
        if i in run.nan:
            model["w"][0] = torch.nan
        whole.update(step=step if run.is_given else None, lr=learning_rate(i + 1))
        model["w"].copy_(kept)
    recorder.close()
    return made, lost_at


@pytest.mark.property
@pytest.mark.parametrize(("name", "own"), TRIED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TRIED)])
@given(run=runs())
@settings(max_examples=settings.default.max_examples // 2)  # each of them writes files
def test_what_was_recorded_is_synthesised_to_the_bit(name, own, run):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", polyak.PolyakWarning)
        made, lost_at = held(run, folder, name, own)
        if made.n == lost_at:
            event("nothing was recorded")
            return
        found = synthesize(folder, name, **own, **run.cadence)
        last = int(made.profile().steps[-1])
        if found.at_step > last and any(run.steps[i] > last for i in run.nan):
            # Others went on, and no file says whether steps jumped there or one that was due was left out.
            event("the last update that was due was left out")
            return
        assert found.profile_error < EXACT
        assert torch.equal(found.state_dict["w"], made.averaged_state_dict()["w"])
