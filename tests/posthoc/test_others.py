"""ema-pytorch's PostHocEMA, the only other library that does this: equal where it is right, and where it is not."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import nn

import polyak
from polyak.posthoc import Recorder, synthesize

pytestmark = pytest.mark.parity
T = 1000
WIDTHS = (0.05, 0.10)


class Position(nn.Module):
    """A weight whose value is the part of the run that is over, so that its average is where the average lies."""

    def __init__(self, size=1):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def theirs(folder, *, update_every=1, checkpoint_every=100, steps=T, dtype=torch.float64):
    from ema_pytorch import PostHocEMA

    model = Position()
    made = PostHocEMA(
        model, sigma_rels=WIDTHS, update_every=update_every, checkpoint_every_num_steps=checkpoint_every,
        checkpoint_folder=str(folder), checkpoint_dtype=dtype,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        for step in range(1, steps + 1):
            model.w.data.fill_(step / T)
            made.update()
    return made


def ours(folder, *, every=1, snapshot=100, steps=T):
    model = Position()
    names = {f"p{width}": {"name": "power", "sigma_rel": width} for width in WIDTHS}
    bank = polyak.bank(model, names, every=every)
    with Recorder(bank, folder, every=snapshot):
        for step in range(1, steps + 1):
            model.w.data.fill_(step / T)
            bank.update()
    return bank


def position(width, at=T, every=1):
    """Return where a power average lies, by the exact sum of its shares."""
    profile = polyak.Profile.of(polyak.PowerEMA(sigma_rel=width), at // every, every=every)
    return float(profile.shares @ profile.steps) / T


def synthesized(made, width, step=None):
    with contextlib.redirect_stdout(io.StringIO()):
        return made.synthesize_ema_model(sigma_rel=width, step=step).ema_model.w.item()


@pytest.mark.parametrize("width", [0.05, 0.07, 0.10, 0.15, 0.20])
def test_at_every_step_both_synthesise_the_same_average(tmp_path, width):
    made = theirs(tmp_path / "theirs")
    ours(tmp_path / "ours")
    other = synthesized(made, width)
    mine = synthesize(tmp_path / "ours", "power", sigma_rel=width)
    # Ten snapshots hold so much of a wide average; theirs, moreover, is shrunk by coefficients that add up to less.
    assert mine.state_dict["w"].item() == pytest.approx(position(width), abs=4e-3)
    assert other == pytest.approx(position(width), abs=1.5e-2)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_update_in_ten_keeps_its_place_here_and_not_there(tmp_path, width):
    made = theirs(tmp_path / "theirs", update_every=10, checkpoint_every=100)
    ours(tmp_path / "ours", every=10)
    right = position(width)
    mine = synthesize(tmp_path / "ours", "power", sigma_rel=width)
    assert mine.profile_error < 1e-12
    # The same width, but for the steps that were left out: within half of their distance.
    assert mine.state_dict["w"].item() == pytest.approx(right, abs=0.5 * 10 / T)
    wrong = synthesized(made, width)
    assert right - wrong > 0.2, (right, wrong)


def test_an_earlier_step_uses_nothing_later_here_and_does_there(tmp_path):
    made = theirs(tmp_path / "theirs", checkpoint_every=100)
    ours(tmp_path / "ours")
    width, at = 0.15, 500
    mine = synthesize(tmp_path / "ours", "power", sigma_rel=width, at_step=at)
    assert all(int(name.split("-")[1].split(".")[0]) <= at for name in mine.coefficients)
    assert sum(mine.coefficients.values()) == pytest.approx(1.0, abs=1e-10)
    right = position(width, at)
    other = synthesized(made, width, step=at)
    assert mine.state_dict["w"].item() == pytest.approx(right, abs=1e-3)
    assert abs(other - right) > 5e-3


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt")  # a coarse store, on purpose
@pytest.mark.filterwarnings("ignore:.*have not changed")  # constant weights, on purpose
def test_a_constant_weight_stays_what_it_is_here_and_shrinks_there(tmp_path):
    from ema_pytorch import PostHocEMA

    model = Position()
    model.w.data.fill_(1.0)
    made = PostHocEMA(
        model, sigma_rels=WIDTHS, update_every=1, checkpoint_every_num_steps=T // 4,
        checkpoint_folder=str(tmp_path / "theirs"), checkpoint_dtype=torch.float64,
    )  # fmt: skip
    bank = polyak.bank(model, {f"p{width}": {"name": "power", "sigma_rel": width} for width in WIDTHS})
    with Recorder(bank, tmp_path / "ours", every=T // 4), contextlib.redirect_stdout(io.StringIO()):
        for _ in range(T):
            made.update()
            bank.update()
    assert synthesize(tmp_path / "ours", "power", sigma_rel=0.25).state_dict["w"].item() == pytest.approx(
        1.0, abs=1e-12
    )
    assert synthesized(made, 0.25) < 0.9
