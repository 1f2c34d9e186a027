"""Synthesised averages against averages that really ran, on a net that was trained on real data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import polyak
from polyak import ConfigError, Profile, StateError
from polyak.posthoc import Recorder, Store, synthesize
from polyak.testing.rates import learning_rate
from posthoc.runs import by_parameter, net, quietly, relative, replayed, summed, trained

STEPS, BLOCK = 400, 20
ROWS = trained(STEPS)
STORED = {
    "p05": {"name": "power", "sigma_rel": 0.05},
    "p10": {"name": "power", "sigma_rel": 0.10},
    "ema": {"name": "ema", "decay": 0.98},
}
# Each target, and how far its weights may be (every=1), relative to their size.
TARGETS = {
    "ema": ({"name": "ema", "decay": 0.97}, 2e-4),
    "a long ema": ({"name": "ema", "decay": 0.999}, 2e-4),
    "ema_debiased": ({"name": "ema_debiased", "decay": 0.99}, 2e-4),
    "ema_halflife": ({"name": "ema_halflife", "halflife": 30}, 2e-4),
    "swa": ({"name": "swa", "start": 310}, 2e-3),
    "swa by blocks": ({"name": "swa", "start": 301}, 1e-10),
    "a narrow power": ({"name": "power", "sigma_rel": 0.04}, 2e-4),
    "a wide power": ({"name": "power", "sigma_rel": 0.22}, 2e-4),
    "polynomial": ({"name": "polynomial", "eta": 8}, 2e-4),
    "tail": ({"name": "tail", "fraction": 0.3, "total_steps": STEPS}, 1e-10),
    "anytime tail": ({"name": "tail", "fraction": 0.3}, 2e-4),
    "lawa": ({"name": "lawa", "window": 30}, 5e-3),
    "dema": ({"name": "dema", "decay": 0.97}, 2e-3),
    "origin": ({"name": "ema", "decay": 0.97, "origin": "first"}, 2e-4),
}


@pytest.fixture(scope="module", params=[(1, STEPS), (10, STEPS), (1, 250)], ids=lambda p: f"every {p[0]}, {p[1]} steps")
def run(request, tmp_path_factory):
    """A recorded run, and averages that really ran beside it: at its own cadence, and at every step."""
    every, steps = request.param
    folder = tmp_path_factory.mktemp("run")
    model = net()
    stored = polyak.bank(model, STORED, every=every)
    same = polyak.bank(model, {name: wanted for name, (wanted, _) in TARGETS.items()}, every=every)
    each = same if every == 1 else polyak.bank(model, {name: wanted for name, (wanted, _) in TARGETS.items()})
    with Recorder(stored, folder, every=BLOCK):
        replayed(model, ROWS[1 : steps + 1], stored, *([same] if each is same else [same, each]))
    return folder, every, steps, {1: each, every: same}


def taken(steps, every):
    """Return, for each step 0 …, the row that an averager of that cadence took for it."""
    return ROWS[[0, *(min(-(-step // every) * every, steps) for step in range(1, steps + 1))]]


@pytest.mark.filterwarnings("ignore:after .* updates the average is still")  # a long one, on purpose
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cadence", ["same", "each step"])
def test_a_synthesised_average_is_as_near_to_the_one_that_ran_as_its_profile(run, name, cadence):
    folder, every, steps, ran = run
    at = every if cadence == "same" else 1
    target, near = TARGETS[name]
    if target.get("start", 0) > steps:
        return
    really = by_parameter(ran[at][name].averaged_state_dict())
    wanted = ran[at][name].profile()
    assert relative(summed(wanted, ROWS), really) < 1e-12  # what is compared with is what it should be
    made = quietly(folder, {**target, "every": at})
    assert made.at_step == steps
    assert made.wanted.distance(wanted) < 1e-12
    got, seen = by_parameter(made.state_dict), taken(steps, every)
    # The weights are exactly what the profile says.
    assert relative(summed(made.profile, seen), got) < 1e-10
    # And no farther from what ran than that profile is: by Cauchy and Schwarz, plus what the cadence left out.
    spread = np.zeros(steps + 1)
    spread[0] = wanted.start
    spread[int(wanted.steps[-1]) + 1 - len(wanted.by_age) : int(wanted.steps[-1]) + 1] += wanted.by_age[::-1]
    apart = made.profile_error * np.linalg.norm(spread) * float(torch.linalg.matrix_norm(seen - seen[-1], 2))
    left_out = float((torch.from_numpy(spread) @ seen - really).norm())
    assert float((got - really).norm()) <= apart + left_out + 1e-10 * float(really.norm())
    if every == 1 and steps == STEPS:
        assert relative(got, really) <= near


@pytest.mark.parametrize("name", STORED)
def test_a_stored_average_comes_back_exactly(run, name):
    folder, every, steps, _ = run
    for at in {steps, 200, 2 * BLOCK}:
        made = synthesize(folder, STORED[name], at_step=at)
        assert made.profile_error < 1e-12
        assert made.amplification == 1.0
        (file,) = made.coefficients
        assert file == f"{name}-{at:012d}.safetensors"
        wanted = polyak.AveragerConfig(strategy=STORED[name], every=every).profile(at)
        assert relative(by_parameter(made.state_dict), summed(wanted, ROWS)) < 1e-12


@pytest.mark.parametrize("at", [20, 130, 240])
def test_at_an_earlier_step_nothing_later_is_used(run, at):
    folder, every, _, _ = run
    made = quietly(folder, "ema_debiased", decay=0.96, at_step=at)
    assert made.at_step == at
    assert all(int(file.split("-")[1].split(".")[0]) <= at for file in made.coefficients)
    assert int(made.profile.steps[-1]) == at
    seen = taken(at, every)
    assert relative(summed(made.profile, seen), by_parameter(made.state_dict)) < 1e-10
    model = net()
    ran = polyak.average(model, "ema_debiased", decay=0.96, every=every)
    replayed(model, ROWS[1 : at + 1], ran)
    really = by_parameter(ran.averaged_state_dict())
    apart = relative(by_parameter(made.state_dict), really)
    if at % BLOCK == 0:
        assert apart < 1e-3
    else:  # a third of the wanted average lies in the ten steps of which there is no snapshot
        assert made.profile_error > 0.3
        assert apart < 0.2


def test_a_mixture_of_profiles_is_as_good_a_target(run):
    folder, every, steps, _ = run
    n = steps // every
    long = Profile.of(polyak.SWA(), n, every=every)
    short = Profile.of(polyak.EMA(decay=0.97), n, every=every)
    for part in (0.5, -0.3):
        shares = part * long.shares + (1 - part) * short.shares
        mixture = Profile(shares, long.steps, (1 - part) * short.start, every)
        made = quietly(folder, mixture)
        assert made.wanted is mixture
        wanted = summed(mixture, ROWS)
        assert relative(by_parameter(made.state_dict), wanted) < 1e-3
        ran = (part * summed(long, ROWS)) + (1 - part) * summed(short, ROWS)
        assert relative(ran, wanted) < 1e-12


def test_coefficients_that_are_not_negative_make_a_true_average(run):
    folder, every, steps, _ = run
    made = synthesize(folder, "ema_debiased", decay=0.95, nonnegative=True)
    assert min(made.coefficients.values()) > 0
    assert sum(made.coefficients.values()) == pytest.approx(1.0, abs=1e-12)
    assert made.amplification == pytest.approx(1.0, abs=1e-12)
    got = by_parameter(made.state_dict)
    seen = ROWS[: steps + 1]
    assert bool(((got >= seen.amin(0) - 1e-12) & (got <= seen.amax(0) + 1e-12)).all())
    assert relative(summed(made.profile, taken(steps, every)), got) < 1e-10


def test_every_way_to_name_a_target_means_the_same(run):
    folder = run[0]
    ways = [
        quietly(folder, "power", sigma_rel=0.07),
        quietly(folder, polyak.PowerEMA(sigma_rel=0.07)),
        quietly(folder, {"name": "power", "sigma_rel": 0.07}),
        quietly(folder, {"strategy": {"name": "power", "sigma_rel": 0.07}}),
        quietly(Store(folder), {"name": "power"}, sigma_rel=0.07),
    ]
    assert all(way.coefficients == ways[0].coefficients for way in ways)
    again = quietly(folder, ways[0].wanted)
    assert relative(by_parameter(again.state_dict), by_parameter(ways[0].state_dict)) < 1e-12


def test_a_target_is_updated_as_often_as_what_was_recorded_where_nothing_is_said(run):
    folder, every, steps, _ = run
    assert len(synthesize(folder, "swa").wanted) == steps // every
    assert len(quietly(folder, "swa", every=5).wanted) == steps // 5


def test_float32_costs_a_rounding_times_the_amplification(tmp_path):
    model = net().float()
    bank = polyak.bank(model, STORED)
    with Recorder(bank, tmp_path, every=BLOCK):
        replayed(model, ROWS[1:].float(), bank)
    rows = torch.cat([ROWS[:1].float(), ROWS[1:].float()]).double()
    for target, settings in (("ema_debiased", {"decay": 0.96}), ("polynomial", {"eta": 5}), ("swa", {"start": 301})):
        made = quietly(tmp_path, target, **settings)
        assert made.rounding == pytest.approx(made.amplification * 2**-24)
        apart = relative(by_parameter(made.state_dict), summed(made.profile, rows))
        assert apart < 8 * made.rounding  # the averages themselves were rounded at each of many updates
        assert made.state_dict["0.weight"].dtype == torch.float32


def test_ill_conditioned_targets_warn_and_well_conditioned_ones_do_not(tmp_path):
    model = {"w": torch.zeros(3)}
    powers = polyak.bank(model, {"p05": STORED["p05"], "p10": STORED["p10"]})
    with Recorder(powers, tmp_path, every=25):
        for step in range(1, 1001):
            model["w"].fill_(step)
            powers.update()
    synthesize(tmp_path, "power", sigma_rel=0.15)
    with pytest.warns(polyak.PolyakWarning) as told:
        made = synthesize(tmp_path, "ema", decay=0.9)
    assert [str(one.message)[:14] for one in told] == ["ema(decay=0.9)", "the coefficien"]
    assert made.amplification > 30
    assert made.amplification == pytest.approx(sum(map(abs, made.coefficients.values())))
    with pytest.warns(polyak.PolyakWarning, match="cannot be rebuilt accurately"):
        assert synthesize(tmp_path, "ema", decay=0.9, nonnegative=True).amplification == pytest.approx(1.0)


WRONG = [
    ("emaa", {}, "emaa"),
    ("ema", {"decay": 2}, "decay"),
    ("ema", {"width": 2}, "width"),
    (3, {}, "a target is a strategy's name"),
    (polyak.SWA(), {"decay": 0.5}, "set them on it instead"),
    (Profile.of(polyak.SWA(), 5), {"decay": 0.5}, "came with a profile"),
    (Profile.of(polyak.SWA(), 5000), {}, "ends at step 5000"),
    (Profile.of(polyak.SWA(), 0), {}, "no update"),
    ("swa", {"start": 5000}, "no update up to step"),
    ("swa", {"name": "ema"}, "came with the target"),
]


@pytest.mark.parametrize(("target", "settings", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_wrong_target_is_refused(run, target, settings, message):
    with pytest.raises(polyak.ConfigError, match=message):
        synthesize(run[0], target, **settings)


def test_a_step_before_the_first_snapshot_is_refused(run):
    with pytest.raises(StateError, match=r"no snapshot up to step 7.*the first is of step 20"):
        synthesize(run[0], "swa", at_step=7)


def test_a_folder_without_snapshots_is_refused(tmp_path):
    with pytest.raises(StateError, match="there is no folder"):
        synthesize(tmp_path / "missing", "swa")
    with pytest.raises(StateError, match="no snapshots"):
        synthesize(tmp_path, "swa")


def test_what_is_saved_tells_how_it_was_made(run, tmp_path):
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file

    made = quietly(run[0], "power", sigma_rel=0.08)
    made.save(tmp_path / "out.safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    assert {*loaded} == {*made.state_dict}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.state_dict.items())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        about = json.loads(file.metadata()["polyak_synthesis"])
    assert about["at_step"] == made.at_step
    assert about["coefficients"] == made.coefficients
    with pytest.raises(polyak.ConfigError, match=r"\.pt.*expected \.safetensors"):
        made.save(tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("power", {"sigma_rel": 0.1}), ("ema", {"decay": 0.999}), ("ema_debiased", {"decay": 0.99}),
     ("polynomial", {"eta": 3}), ("swa", {})],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1, 2**20, 2**44])
@pytest.mark.filterwarnings("ignore:after 300 updates the average is still")  # a long one, on purpose
def test_a_run_that_goes_on_at_a_later_step_has_its_averages_back(tmp_path, name, settings, scale):
    model = {"w": torch.zeros(3, dtype=torch.float64)}
    averager = polyak.average(model, name, **settings)
    with Recorder(averager, tmp_path, every=50 * scale, blocks=True):
        for step in range(5001, 5301):
            model["w"].add_(torch.randn(3, dtype=torch.float64))
            averager.update(step=step * scale)
    made = synthesize(tmp_path, name, **settings)
    assert torch.equal(made.state_dict["w"], averager.averaged_state_dict()["w"])
    assert made.profile_error < 1e-12
    assert made.at_step == 5300 * scale


@pytest.mark.parametrize("jump", [2, 1000])
def test_a_mean_that_starts_late_in_a_run_whose_steps_jump_is_rebuilt_and_said_to_be(tmp_path, jump):
    model = {"w": torch.zeros(3, dtype=torch.float64)}
    late = polyak.average(model, "swa", start=21 * jump)
    stored = polyak.bank(model, STORED)
    with Recorder(stored, tmp_path, every=5 * jump, blocks=True):
        for step in range(jump, 61 * jump, jump):
            model["w"].add_(torch.randn(3, dtype=torch.float64))
            stored.update(step=step)
            late.update(step=step)
    made = synthesize(tmp_path, "swa", start=21 * jump)
    assert relative(made.state_dict["w"], late.averaged_state_dict()["w"]) < 1e-10
    assert made.profile_error < 1e-10


def test_a_target_of_more_updates_than_fit_in_memory_is_refused(tmp_path):
    model = {"w": torch.zeros(1)}
    averager = polyak.average(model, "swa", every=2**30)
    with Recorder(averager, tmp_path, every=2**30):
        for step in range(1, 4):
            averager.update(step=2**30 * step)
    with pytest.raises(ConfigError, match="give a larger every="):
        synthesize(tmp_path, "swa", every=1)


def test_an_average_that_uses_the_learning_rate_has_that_of_the_run(tmp_path):
    strategy = {"name": "lr_weighted", "power": 1.0}
    model = {"w": torch.zeros(2, dtype=torch.float64)}
    bank = polyak.bank(model, {"lr": {"name": "lr_weighted"}, "other": strategy, "ema": {"name": "ema", "decay": 0.9}})
    recorded = polyak.bank(model, {"lr": {"name": "lr_weighted"}, "ema": {"name": "ema", "decay": 0.9}})
    with Recorder(recorded, tmp_path / "run", every=1):
        for step in range(1, 31):
            model["w"].normal_()
            for one in (bank, recorded):
                one.update(lr=learning_rate(step))
    made = quietly(tmp_path / "run", strategy)
    torch.testing.assert_close(made.state_dict, bank["other"].averaged_state_dict(), rtol=0, atol=1e-9)
    plain = polyak.average(model, "ema", decay=0.9)
    with Recorder(plain, tmp_path / "plain", every=1):
        for _ in range(2):
            plain.update(lr=0.1)
    with pytest.raises(ConfigError, match="Learning rates are recorded with averages that use them"):
        synthesize(tmp_path / "plain", strategy)


def test_values_that_are_not_finite_are_said_beside_a_profile_error_of_nothing(tmp_path):
    model = {"w": torch.ones(2), "v": torch.ones(2)}
    averager = polyak.average(model, "swa", nonfinite="propagate")
    with Recorder(averager, tmp_path, every=1, blocks=False):
        averager.update()
        model["w"][0] = torch.inf
        averager.update()
    assert synthesize(tmp_path, "swa", at_step=1).state_dict["w"].tolist() == [1.0, 1.0]
    told = (
        r"the synthesised 'w' holds NaN or infinities.*so does the snapshot 'average-000000000002.safetensors'.*float32"
    )
    with pytest.warns(polyak.PolyakWarning, match=told):
        assert synthesize(tmp_path, "swa").profile_error < 1e-12


def test_a_dtype_of_the_model_that_is_too_short_for_the_synthesised_values_is_said(tmp_path):
    model = {"w": torch.full((2,), -6e4, dtype=torch.float16)}
    averager = polyak.average(model, "dema", decay=0.5)
    with Recorder(averager, tmp_path, every=1, blocks=False):
        for _ in range(3):
            model["w"].fill_(6e4)
            averager.update()  # which goes beyond the weights after a jump
    assert averager.averages["w"].abs().max() > torch.finfo(torch.float16).max
    with pytest.warns(polyak.PolyakWarning, match="the model's dtype is too short"):
        synthesize(tmp_path, "dema", decay=0.5)
