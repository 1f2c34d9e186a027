"""The least squares: the figures of the field, exact targets, sums of one, and coefficients that are not negative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import polyak
from polyak import EMA, LAWA, SWA, BlockMean, PowerEMA, Profile
from polyak.posthoc import Recorder, Store, synthesize
from polyak.posthoc.least_squares import fit, mixed

T = 4096
WIDTHS = (0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
# Karras et al.'s stores of two power averages (0.05 and 0.10): the relative L2 error of a profile, by its sigma_rel.
TABLE = {
    4: (1.7e-1, 5e-16, 3.5e-2, 6e-16, 1.1e-1, 2.2e-1, 3.9e-1),
    16: (3.9e-2, 1e-15, 3.5e-3, 3e-15, 9.0e-3, 2.3e-2, 7.9e-2),
    64: (2.9e-3, 2e-14, 2.3e-4, 3e-14, 5.8e-4, 1.7e-3, 1.5e-2),
}
EXACT = 1e-12


def powers(snapshots, steps=T):
    """Return the profiles of a store of so many snapshots of two power averages."""
    at = [steps * (i + 1) // snapshots for i in range(snapshots)]
    return [Profile.of(PowerEMA(sigma_rel=sigma), step) for sigma in (0.05, 0.10) for step in at]


def blocks(snapshots, steps=T):
    """Return the profiles of so many means of consecutive blocks."""
    length = steps // snapshots
    return [Profile.of(BlockMean(length=length), length * (i + 1)) for i in range(snapshots)]


def dense(profile, steps):
    """Return the start and each single step 1 … of a profile as a vector."""
    column = np.zeros(steps + 1)
    column[0] = profile.start
    last = int(profile.steps[-1])
    column[last + 1 - len(profile.by_age) : last + 1] = profile.by_age[::-1]
    return column


@pytest.mark.parametrize("snapshots", TABLE)
def test_the_errors_of_stores_of_power_averages_are_those_of_the_field(snapshots):
    found = fit(powers(snapshots), [Profile.of(PowerEMA(sigma_rel=sigma), T) for sigma in WIDTHS])
    for sigma, one, known in zip(WIDTHS, found, TABLE[snapshots], strict=True):
        assert one.error <= (EXACT if known < EXACT else 1.1 * known), sigma
        assert one.coefficients.sum() == pytest.approx(1.0, abs=1e-10)
        if known > EXACT:  # what is far better than what is possible is no least squares of these profiles
            assert one.error >= 0.8 * known, sigma


def test_a_recorded_run_has_the_errors_of_the_field(tmp_path):
    model = {"w": torch.zeros(2)}
    bank = polyak.bank(model, {f"p{s}": {"name": "power", "sigma_rel": s} for s in (0.05, 0.10)})
    with Recorder(bank, tmp_path, every=T // 16):
        for _ in range(T):
            model["w"].add_(1.0)
            bank.update()
    store = Store(tmp_path)
    assert len(store.snapshots) == 2 * 16 + 1  # the start
    for sigma, known in zip(WIDTHS, TABLE[16], strict=True):
        made = synthesize(store, "power", sigma_rel=sigma)
        assert made.profile_error <= (EXACT if known < EXACT else 1.1 * known), sigma
        wanted = Profile.of(PowerEMA(sigma_rel=sigma), T)
        told = np.linalg.norm(dense(made.profile, T) - dense(wanted, T)) / np.linalg.norm(dense(wanted, T))
        assert told == pytest.approx(made.profile_error, rel=1e-6, abs=1e-13)


def test_an_error_is_that_of_the_dense_least_squares():
    known, steps = powers(8, 512), 512
    matrix = np.column_stack([dense(one, steps) for one in known])
    for wanted in (Profile.of(EMA(decay=0.99), steps), Profile.of(SWA(), steps), Profile.of(LAWA(window=99), steps)):
        (found,) = fit(known, [wanted])
        target = dense(wanted, steps)
        got = np.linalg.norm(matrix @ found.coefficients - target) / np.linalg.norm(target)
        assert found.error == pytest.approx(got, rel=1e-9)
        # By a Lagrange multiplier: another way to the same minimum.
        n = len(known)
        system = np.block([[matrix.T @ matrix, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
        x = np.linalg.lstsq(system, np.append(matrix.T @ target, 1.0), rcond=1e-15)[0][:n]
        best = np.linalg.norm(matrix @ (x / x.sum()) - target) / np.linalg.norm(target)
        assert found.error <= best * (1 + 1e-6)


def test_steps_that_count_the_same_are_solved_as_one():
    scale = 2**30

    def stretched(profile):
        return Profile(profile.shares, scale * profile.steps, profile.start, scale)

    known = powers(6, 512)
    for wanted in (Profile.of(EMA(decay=0.99), 512), Profile.of(SWA(), 300)):
        (found,), (wide,) = fit(known, [wanted]), fit([*map(stretched, known)], [stretched(wanted)])
        np.testing.assert_allclose(wide.coefficients, found.coefficients, rtol=1e-6)
        whole = mixed([*map(stretched, known)], wide.coefficients, scale * 512)
        np.testing.assert_allclose(whole.shares, mixed(known, found.coefficients, 512).shares, atol=1e-9)


@pytest.mark.parametrize("which", [0, 5, 31])
def test_a_stored_profile_is_found_exactly_and_alone(which):
    known = powers(16)
    (found,) = fit(known, [known[which]])
    assert found.error < EXACT
    assert np.flatnonzero(found.coefficients).tolist() == [which]
    assert found.coefficients[which] == 1.0


def test_a_mixture_of_what_is_stored_is_found():
    known = powers(6)
    x = np.array([0.2, 0.0, 0.5, 0.0, 0.0, 0.6, 0.0, 0.0, -0.3, 0.0, 0.0, 0.0])
    (found,) = fit(known, [mixed(known, x, T)])
    assert found.error < 1e-12
    np.testing.assert_allclose(found.coefficients, x, atol=1e-9)


def test_one_snapshot_is_all_there_can_be():
    (found,) = fit([Profile.of(SWA(), 10)], [Profile.of(EMA(decay=0.9), 10)])
    assert found.coefficients.tolist() == [1.0]
    assert found.error > 0.1


TAILS = {
    "the last quarter": Profile.of(SWA(), T // 4, start=T - T // 4 + 1),
    "the last half": Profile.of(SWA(), T // 2, start=T - T // 2 + 1),
    "a wide power": Profile.of(PowerEMA(sigma_rel=0.25), T),
    "the mean": Profile.of(SWA(), T),
}
OTHERS = {
    "the last tenth": Profile.of(SWA(), T // 10, start=T - T // 10 + 1),
    "a window": Profile.of(LAWA(window=400), T),
    "a short half-life": Profile.of(EMA(decay=0.5 ** (1 / 82)), T, origin="first"),
    "a narrow power": Profile.of(PowerEMA(sigma_rel=0.03), T),
}


@pytest.mark.parametrize("wanted", TAILS.values(), ids=TAILS)
def test_means_of_blocks_beat_as_many_power_averages_of_long_windows(wanted):
    (mean,), (power,) = fit(blocks(64), [wanted]), fit(powers(32), [wanted])
    assert mean.error < power.error / 4 or mean.error < EXACT
    assert np.abs(mean.coefficients).sum() < np.abs(power.coefficients).sum()


@pytest.mark.parametrize("wanted", [*TAILS.values(), *OTHERS.values()], ids=[*TAILS, *OTHERS])
def test_power_averages_with_means_of_blocks_beside_them_beat_power_averages_only(wanted):
    (both,), (power,) = fit(powers(32) + blocks(32), [wanted]), fit(powers(32), [wanted])
    assert both.error < 0.75 * power.error


def test_power_averages_and_the_start_rebuild_an_ema_as_well_as_is_known():
    start = Profile(np.empty(0), np.empty(0, np.int64), start=1.0)
    for half_life, known in ((0.02, 0.0046), (0.10, 0.0007)):
        wanted = Profile.of(EMA(decay=0.5 ** (1 / (half_life * T))), T)
        (found,) = fit([start, *powers(64)], [wanted])
        assert found.error <= 1.1 * known


def test_means_of_blocks_make_up_any_tail_that_begins_with_one():
    for k in (1, 7, 16, 64):
        length = k * T // 64
        (found,) = fit(blocks(64), [Profile.of(SWA(), length, start=T - length + 1)])
        assert found.error < EXACT
        np.testing.assert_allclose(found.coefficients, [0.0] * (64 - k) + [1 / k] * k, atol=1e-9)


def test_means_of_blocks_rebuild_an_ema_as_well_as_is_known_without_negative_coefficients():
    for half_life, known in ((410, 0.0135), (82, 0.067)):  # 10 % and 2 % of the run: the total variation distances
        wanted = Profile.of(EMA(decay=0.5 ** (1 / half_life)), T, origin="first")
        (found,) = fit(blocks(64), [wanted], nonnegative=True)
        assert mixed(blocks(64), found.coefficients, T).distance(wanted) <= 1.1 * known
        assert np.abs(found.coefficients).sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("known", [powers(8, 512), blocks(16, 512)], ids=["powers", "blocks"])
@pytest.mark.parametrize(
    "wanted", [EMA(decay=0.98), EMA(decay=0.999), LAWA(window=50), PowerEMA(sigma_rel=0.2)], ids=str
)
def test_coefficients_that_are_not_negative_are_the_best_of_them(known, wanted):
    from scipy.optimize import minimize

    target = Profile.of(wanted, 512)
    (found,) = fit(known, [target], nonnegative=True)
    assert (found.coefficients >= 0).all()
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-12)
    matrix, vector = np.column_stack([dense(one, 512) for one in known]), dense(target, 512)
    scale = np.linalg.norm(vector)

    def loss(x):
        rest = (matrix @ x - vector) / scale
        return float(rest @ rest), 2 * matrix.T @ rest / scale

    n = len(known)
    other = minimize(
        loss, np.full(n, 1 / n), jac=True, method="SLSQP", bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones(n)},
        options={"maxiter": 2000, "ftol": 1e-14},
    )  # fmt: skip
    assert found.error <= np.sqrt(other.fun) * (1 + 1e-4)
    (free,) = fit(known, [target])
    assert free.error <= found.error * (1 + 1e-9)


PROFILES = st.one_of(
    st.builds(lambda d, n: Profile.of(EMA(decay=d), n), st.floats(0, 0.99), st.integers(1, 80)),
    st.builds(lambda n, every: Profile.of(SWA(), n, every=every), st.integers(1, 40), st.integers(1, 3)),
    st.builds(lambda s, n: Profile.of(PowerEMA(sigma_rel=s), n), st.floats(0.02, 0.28), st.integers(1, 80)),
)


@pytest.mark.property
@given(known=st.lists(PROFILES, min_size=1, max_size=8), wanted=PROFILES, nonnegative=st.booleans())
def test_the_sum_is_always_one_and_no_single_snapshot_is_nearer(known, wanted, nonnegative):
    (found,) = fit(known, [wanted], nonnegative=nonnegative)
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-9 * np.abs(found.coefficients).sum())
    alone = min(fit([one], [wanted])[0].error for one in known)
    assert found.error <= alone * (1 + 1e-5) + 1e-9
    if nonnegative:
        assert found.coefficients.min() >= 0


def test_a_profile_longer_than_a_block_of_the_factorisation_loses_nothing():
    steps = 40_000
    known = [Profile.of(SWA(), 10_000 * k) for k in (1, 2, 3, 4)]
    wanted = Profile.of(SWA(), 20_000, start=20_001)
    (found,) = fit(known, [wanted])
    np.testing.assert_allclose(found.coefficients, [0.0, -1.0, 0.0, 2.0], atol=1e-9)
    assert found.error < 1e-12
    assert len(mixed(known, found.coefficients, steps)) == steps


def test_snapshots_that_are_rounded_get_smaller_coefficients_and_those_of_a_stored_average_stay():
    known = powers(64)
    wanted = Profile.of(EMA(decay=0.5 ** (1 / 41)), T)
    (exact,) = fit(known, [wanted])
    before = exact
    for unit in (2**-24, 2**-11, 2**-8):
        found, stored = fit(known, [wanted, known[3]], noise=[unit] * len(known))
        assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-9)
        assert found.error >= exact.error * (1 - 1e-9)
        assert found.amplification <= before.amplification * (1 + 1e-9)
        assert found.rounding == pytest.approx(unit * np.abs(found.coefficients).sum())
        assert np.flatnonzero(stored.coefficients).tolist() == [3]
        before = found
    assert before.amplification < exact.amplification / 4
