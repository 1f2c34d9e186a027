"""`polyak.files.average`: float64 sums rounded once, whatever the format, and the metadata that say how."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import polyak
from files.conftest import mean, weights
from polyak import files
from polyak.errors import ConfigError, MismatchError, NonFiniteError


def loaded(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("out", ["o.safetensors", "o.pt", "o.bin", "o.ckpt", "o.pth"])
@pytest.mark.parametrize("how", ["safetensors", "pt", "legacy"])
def test_the_mean_is_summed_in_float64_and_rounded_once(how, out, states, tmp_path):
    paths = [tmp_path / f"{seed}.{'pt' if how == 'legacy' else how}" for seed in range(3)]
    for state, path in zip(states, paths, strict=True):
        if how == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=how == "pt")
    made = loaded(files.average(paths, out=tmp_path / out).out)
    assert list(made) == list(states[0]) or "safetensors" in how + out
    for name in ("embed.weight", "layer.bias"):
        assert torch.equal(made[name], mean(states, name=name).float())
    assert made["layer.weight"].dtype == torch.bfloat16
    exact = mean(states, name="layer.weight")
    error = (made["layer.weight"].double() - exact).abs()
    assert bool((error <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() * (1 + 1e-9)).all())
    assert made["norm.num_batches_tracked"] == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_short_dtypes_are_rounded_to_the_nearest_and_never_twice(dtype, tmp_path):
    every = torch.arange(256 if dtype.itemsize == 1 else 65536)
    bits = every.to(torch.uint8 if dtype.itemsize == 1 else torch.int32).to(
        torch.uint8 if dtype.itemsize == 1 else torch.uint16
    )
    values = bits.view(dtype)
    values = values[values.double().isfinite()]
    order = values.double().sort().values.unique()
    # Just above and below every middle of two neighbours, by less than float32 resolves.
    middles = (order[1:] + order[:-1]) / 2
    nudge = (order[1:] - order[:-1]) * 2.0**-35
    for sign in (-1, 1):
        exact = middles + sign * nudge
        save_file({"w": exact}, tmp_path / "a.safetensors")
        save_file({"w": exact.clone()}, tmp_path / "b.safetensors")
        files.average(
            [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out=tmp_path / "o.safetensors",
            dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip
        made = load_file(tmp_path / "o.safetensors")["w"].double()
        assert torch.equal(made, order[1:] if sign > 0 else order[:-1])


def test_equal_files_are_a_fixed_point_in_every_dtype(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    state = {
        str(kind): torch.randn(1000, dtype=torch.complex128 if kind.is_complex else torch.float64).to(kind)
        for kind in kinds
    }
    for i in range(7):
        save_file(state, tmp_path / f"{i}.safetensors")
    files.average([tmp_path / f"{i}.safetensors" for i in range(7)], out=tmp_path / "o.safetensors")
    made = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(made[name], state[name]) for name in state)


def test_many_pieces_and_threads_give_the_same_bits(tmp_path):
    big = [{"w": torch.randn(700_001), "z": torch.randn(3, 5, dtype=torch.float64)} for _ in range(3)]
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for state, path in zip(big, paths, strict=True):
        torch.save(state, path)
    made = [
        loaded(files.average(paths, [0.5, 0.25, 0.25], out=tmp_path / f"o{threads}.pt", threads=threads).out)["w"]
        for threads in (1, 2, 7)
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0], mean(big, [0.5, 0.25, 0.25], "w").float())


def test_a_strategy_counts_files_by_the_distance_of_their_steps(run, tmp_path):
    made = files.average(run, polyak.HalfLifeEMA(halflife=100), out=tmp_path / "o.safetensors")
    assert made.weights == pytest.approx((0.125, 0.125, 0.75))
    assert made.steps == (100, 200, 400)
    again = files.average(run[::-1], {"name": "ema_halflife", "halflife": 100}, out=tmp_path / "o.safetensors")
    assert again.weights == pytest.approx((0.125, 0.125, 0.75))
    assert again.files == tuple(run)


@pytest.mark.parametrize(("name", "wanted"), [("swa", [1 / 3] * 3), ("lawa", [1 / 3] * 3), ("ema", None)])
def test_any_strategy_by_name(name, wanted, run, tmp_path):
    decay = 0.999
    wanted = wanted or [decay**300, (1 - decay**100) * decay**200, 1 - decay**200]
    assert files.average(run, name, out=tmp_path / "o.safetensors").weights == pytest.approx(tuple(wanted))


def test_weights_in_the_shape_of_a_decay(run, tmp_path):
    assert files.average(run, files.wsm(), out=tmp_path / "o.safetensors").weights == pytest.approx((1 / 3,) * 3)
    made = files.average(run, files.wsm("minus_sqrt"), out=tmp_path / "o.safetensors").weights
    kept = [1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5, 0]
    assert made == pytest.approx(tuple(kept[i] - kept[i + 1] for i in range(3)))
    assert sum(files.average(run, files.wsm("cosine"), out=tmp_path / "o.safetensors").weights) == pytest.approx(1)


def test_a_decay_of_sgd_is_what_these_weights_stand_for():
    gradients = torch.randn(6, 4, dtype=torch.float64)
    points = torch.cat([torch.zeros(1, 4, dtype=torch.float64), -gradients[:5].cumsum(0)])  # one step each, rate 1
    for decay, f in (("linear", lambda x: 1 - x), ("minus_sqrt", lambda x: 1 - x**0.5)):
        from polyak.files.weights import shares_of

        shares = shares_of(files.wsm(decay), range(6))
        decayed = -sum(f(i / 6) * gradients[i - 1] for i in range(1, 6))
        assert torch.allclose(torch.tensor(shares, dtype=torch.float64) @ points, decayed)


def test_given_weights_add_up_to_one_or_are_normalised_on_demand(run, tmp_path):
    out = tmp_path / "o.safetensors"
    with pytest.raises(ConfigError, match="add up to 4"):
        files.average(run, [1, 1, 2], out=out)
    assert files.average(run, [1, 1, 2], out=out, normalize=True).weights == (0.25, 0.25, 0.5)
    with pytest.raises(ConfigError, match="2 numbers for 3 files"):
        files.average(run, [0.5, 0.5], out=out)
    with pytest.raises(polyak.errors.ArgumentError, match="expected 'uniform'"):
        files.average(run, [0.5, float("nan"), 0.5], out=out)


def test_which_files(run, states, tmp_path):
    out = tmp_path / "o.safetensors"
    assert files.average(run[::-1], out=out, last=2).files == tuple(run[1:])
    assert files.average(run, out=out, until=200).files == tuple(run[:2])
    assert files.average(run, out=out, last=2, until=300).files == tuple(run[:2])
    metrics = {"step-100.safetensors": 0.3, "step-200": 0.1, "400": 0.2}
    assert files.average(run, out=out, best=2, metrics=metrics).files == tuple(run[1:])
    (tmp_path / "m.json").write_text(json.dumps(metrics))
    made = files.average(run, out=out, best=2, metrics=tmp_path / "m.json", mode="max")
    assert made.files == (run[0], run[2])
    for wrong in ({"last": 2, "best": 2, "metrics": metrics}, {"best": 2}, {"until": 3}, {"last": 0}, {"last": 1}):
        with pytest.raises(ConfigError):
            files.average(run, out=out, **wrong)
    with pytest.raises(ConfigError, match=r"no number for 'step-400\.safetensors'"):
        files.average(run, out=out, best=1, metrics={"step-100": 1.0, "step-200": 2.0})


def test_numbers_in_names_are_numbers(states, tmp_path):
    for step, state in zip((9, 10, 100), states, strict=True):
        torch.save(state, tmp_path / f"model_{step}.pth.tar")
    made = files.average(sorted(tmp_path.glob("*.tar")), out=tmp_path / "o.pt", last=2)
    assert made.steps == (10, 100)


def test_integers_are_those_of_one_file_and_never_summed(run, tmp_path):
    out = tmp_path / "o.safetensors"
    for policy, wanted in (("last", 12), ("first", 10)):
        files.average(run, out=out, integers=policy)
        assert load_file(out)["norm.num_batches_tracked"] == wanted
    out.unlink()
    with pytest.raises(MismatchError, match=r"norm\.num_batches_tracked.*integers='last'"):
        files.average(run, out=out, integers="equal")
    assert not out.exists()


def test_tied_tensors_are_one_and_stay_tied(tmp_path):
    for seed in range(2):
        state = weights(seed)
        torch.save({**state, "head.weight": state["embed.weight"]}, tmp_path / f"{seed}.pt")
    made = files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.pt")
    state = torch.load(made.out, weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert torch.equal(state["embed.weight"], mean([weights(0), weights(1)]).float())
    files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.safetensors")
    assert torch.equal(load_file(tmp_path / "o.safetensors")["head.weight"], state["embed.weight"])


def test_a_name_that_one_file_lacks_is_found_by_its_tie(tmp_path):
    first, second = weights(0), weights(1)
    torch.save({**first, "head.weight": first["embed.weight"]}, tmp_path / "0.pt")
    save_file(second, tmp_path / "1.safetensors")
    files.average([tmp_path / "0.pt", tmp_path / "1.safetensors"], out=tmp_path / "o.safetensors")
    made = load_file(tmp_path / "o.safetensors")
    assert torch.equal(made["head.weight"], made["embed.weight"])


def test_files_of_different_dtypes_give_the_widest(tmp_path):
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    state = torch.randn(50)
    for number, kind in enumerate(kinds):
        save_file({"w": state.to(kind)}, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for some, wanted in ((paths[:2], torch.float32), (paths[1:], torch.float32), ([paths[0], paths[2]], torch.float32)):
        files.average(some, out=tmp_path / "o.safetensors")
        assert load_file(tmp_path / "o.safetensors")["w"].dtype == wanted
    files.average(paths, out=tmp_path / "o.safetensors", dtype=torch.float16)
    exact = sum(state.to(kind).double() for kind in kinds) / 3
    assert torch.allclose(load_file(tmp_path / "o.safetensors")["w"].double(), exact, rtol=2**-11)


def test_views_with_strides_and_small_tensors(tmp_path):
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        base = torch.randn(6, 4)
        state = {
            "t": base.t(), "row": base[2:4], "column": base[:, 1], "expanded": torch.randn(1).expand(5),
            "scalar": torch.randn(()), "empty": torch.empty(0, 3),
            "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        }  # fmt: skip
        states.append(state)
        torch.save(state, tmp_path / f"{seed}.pt")
    files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.safetensors")
    made = load_file(tmp_path / "o.safetensors")
    for name in states[0]:
        assert torch.equal(made[name], mean(states, name=name).float()), name


def test_complex_tensors_keep_both_parts(tmp_path):
    states = [
        {"c": torch.randn(9, dtype=torch.complex128), "d": torch.randn(4, 2, dtype=torch.complex64).t()}
        for _ in range(2)
    ]
    for number, state in enumerate(states):
        torch.save(state, tmp_path / f"{number}.pt")
    made = torch.load(files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.pt").out)
    assert torch.allclose(made["c"], (states[0]["c"] + states[1]["c"]) / 2, rtol=1e-15)
    assert torch.allclose(made["d"], (states[0]["d"] + states[1]["d"]) / 2)
    with pytest.raises(ConfigError, match=r"no \.safetensors file holds"):
        files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.safetensors")


@pytest.mark.parametrize("out", ["o.safetensors", "o.pt"])
def test_the_output_says_how_it_was_made(out, run, tmp_path):
    made = files.average(run, {"name": "ema_halflife", "halflife": 100}, out=tmp_path / out)
    with files.open(made.out) as checkpoint:
        kind, about = checkpoint.made
    assert kind == "polyak_average"
    assert [one["sha256"] for one in about["inputs"]] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in run]
    assert [one["bytes"] for one in about["inputs"]] == [path.stat().st_size for path in run]
    assert about["steps"] == [100, 200, 400]
    assert about["weights"] == list(made.weights)
    assert about["rule"]["name"] == "ema_halflife"
    assert about["polyak"] == polyak.__version__
    if out.endswith("safetensors"):
        with safe_open(made.out, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
    else:
        assert zipfile.ZipFile(made.out).testzip() is None


def test_hashes_of_files_with_more_than_weights(tmp_path):
    model = torch.nn.Linear(200, 300)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 200)).sum().backward()
        optimizer.step()
        torch.save(
            {"optimizer": optimizer.state_dict(), "model": model.state_dict(), "step": step}, tmp_path / f"{step}.pt"
        )
    made = files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.pt")
    with files.open(made.out) as checkpoint:
        sums = [one["sha256"] for one in checkpoint.made[1]["inputs"]]
    assert sums == [hashlib.sha256((tmp_path / f"{i}.pt").read_bytes()).hexdigest() for i in range(2)]
    made = files.average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "o.pt", hashes=False)
    with files.open(made.out) as checkpoint:
        assert "sha256" not in checkpoint.made[1]["inputs"][0]


def test_nan_is_refused_by_name_or_let_through(run, states, tmp_path, left):
    states[1]["layer.weight"][3, 3] = float("nan")
    save_file(states[1], run[1])
    before = left()
    with pytest.raises(NonFiniteError, match=r"'layer\.weight' in '.*step-200\.safetensors'"):
        files.average(run, out=tmp_path / "o.safetensors")
    assert left() == before
    files.average(run, out=tmp_path / "o.safetensors", nonfinite="propagate")
    assert load_file(tmp_path / "o.safetensors")["layer.weight"].isnan().sum() == 1


def test_values_that_do_not_fit_the_wanted_dtype_are_refused(tmp_path):
    for number in range(2):
        save_file({"w": torch.tensor([1.0, 1e6])}, tmp_path / f"{number}.safetensors")
    with pytest.raises(NonFiniteError, match="float16"):
        files.average(
            [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], out=tmp_path / "o.safetensors", dtype="float16"
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_names_that_some_files_lack(run, states, tmp_path):
    save_file({**states[2], "extra": torch.ones(2)}, run[2])
    with pytest.raises(
        MismatchError, match=r"'extra' is in 'step-400\.safetensors' and not in 'step-100\.safetensors'"
    ):
        files.average(run, out=tmp_path / "o.safetensors")
    made = files.average(run, out=tmp_path / "o.safetensors", match="common")
    assert made.notes == ("skipped, since not all files have them: extra",)
    assert "extra" not in load_file(made.out)
