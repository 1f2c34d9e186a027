"""Every sort of model: what is synthesised loads strictly, is as precise as it says, and is the right average."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import polyak
from models import ZOO, Tied, bits, drifting, mlp
from polyak.posthoc import Recorder, Store, synthesize
from posthoc.runs import flat, quietly, relative

KINDS = [kind for kind in ZOO.values() if kind.name != "shapes"]  # its weights overlap, and are no state of their own


def recorded(folder, model, strategy="ema", *, every=5, steps=20, dtype="auto", seed=0, **options):
    averager = polyak.average(model, strategy, **options)
    with Recorder(averager, folder, every=every, dtype=dtype):
        for _ in drifting(model, steps, seed):
            averager.update()
    return averager


@pytest.mark.parametrize("kind", ZOO.values(), ids=str)
def test_a_stored_average_of_any_model_is_its_averaged_state_dict_and_loads_strictly(tmp_path, kind):
    model = kind.build()
    averager = recorded(tmp_path, model, decay=0.7)
    made = synthesize(tmp_path, "ema", decay=0.7)
    expected = averager.averaged_state_dict()
    assert [*made.state_dict] == [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    for key, tensor in made.state_dict.items():
        assert bits(tensor) == bits(expected[key]), key
    expanded = kind.name == "buffers"  # torch copies nothing into a tensor that overlaps itself
    kind.build().load_state_dict(made.state_dict, strict=True, assign=expanded)
    if kind.name == "complex":
        with pytest.raises(polyak.ConfigError, match="complex128"):
            made.save(tmp_path / "out.safetensors")
        return
    made.save(tmp_path / "out.safetensors")
    kind.build().load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True, assign=expanded)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_combination_of_any_model_is_the_average_that_ran(tmp_path, kind):
    model = kind.build()
    tail = polyak.average(model, "swa", start=11)
    averager = polyak.average(model, "ema", decay=0.7)
    with Recorder(averager, tmp_path, every=5):
        for _ in drifting(model, 20):
            averager.update()
            tail.update()
    made = quietly(tmp_path, "swa", start=11)
    assert made.profile_error < 1e-12
    expected = tail.averaged_state_dict()
    for key, tensor in made.state_dict.items():
        wanted = expected[key]
        if tensor.is_floating_point() or tensor.is_complex():
            room = max(torch.finfo(tensor.dtype).eps, 20 * torch.finfo(torch.float32).eps)
            exact = torch.complex128 if tensor.is_complex() else torch.float64
            torch.testing.assert_close(tensor.to(exact), wanted.to(exact), rtol=room, atol=room * 2, equal_nan=True)
        else:
            assert torch.equal(tensor, wanted), key


def test_tied_weights_are_one_tensor_in_the_file_and_two_in_the_result(tmp_path):
    recorded(tmp_path, Tied())
    snapshot = Store(tmp_path).snapshots[-1]
    assert "weights/emb.weight" in snapshot.file.names
    assert "weights/head.weight" not in snapshot.file.names
    made = quietly(tmp_path, "swa")
    assert torch.equal(made.state_dict["emb.weight"], made.state_dict["head.weight"])
    model = Tied()
    model.load_state_dict(made.state_dict, strict=True)
    assert model.head.weight is model.emb.weight


def test_integers_and_masks_are_those_of_the_last_step_that_counts(tmp_path):
    model = ZOO["buffers"].build()
    averager = polyak.average(model, "ema", decay=0.9)
    seen = {}
    with Recorder(averager, tmp_path, every=5):
        for number in drifting(model, 20):
            averager.update()
            seen[number] = {key: value.clone() for key, value in model.state_dict().items()}
    for at, step in ((None, 20), (10, 10), (13, 10)):
        made = quietly(tmp_path, "swa", at_step=at)
        for key in ("count", "flags"):
            assert torch.equal(made.state_dict[key], seen[step][key])
        assert made.state_dict["count"].dtype == torch.int64


def test_batch_norm_statistics_are_averaged_and_its_counter_is_not(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    tail = polyak.average(model, "swa", start=11)
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, tmp_path, every=5):
        for _ in range(20):
            model(torch.randn(8, 4))
            averager.update()
            tail.update()
    made = quietly(tmp_path, "swa", start=11).state_dict
    assert made["1.num_batches_tracked"].item() == 20
    torch.testing.assert_close(made["1.running_var"], tail.averages["1.running_var"])
    assert not torch.equal(made["1.running_var"], model[1].running_var)


def test_a_bfloat16_model_is_stored_in_float32_and_comes_back_in_bfloat16(tmp_path):
    model = mlp().bfloat16()
    tail = polyak.average(model, "swa", start=11)
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, tmp_path, every=5):
        for _ in drifting(model, 20):
            averager.update()
            tail.update()
    file = Store(tmp_path).snapshots[-1].file
    assert {file.dtype(name) for name in file.names if name.startswith("weights/")} == {torch.float32}
    made = quietly(tmp_path, "swa", start=11)
    assert {tensor.dtype for tensor in made.state_dict.values()} == {torch.bfloat16}
    for key, tensor in made.state_dict.items():
        # The nearest bfloat16 to the float32 average that ran.
        torch.testing.assert_close(tensor.float(), tail.averages[key], rtol=2**-8, atol=1e-6)
    model.load_state_dict(made.state_dict, strict=True)


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 2**-24)])
def test_short_stores_round_as_much_as_they_say(tmp_path, dtype, unit):
    model = nn.Linear(40, 30).double()
    wanted = {"ema": "ema", "p05": {"name": "power", "sigma_rel": 0.05}, "p10": {"name": "power", "sigma_rel": 0.1}}
    exact, short = polyak.bank(model, wanted), polyak.bank(model, wanted)
    with Recorder(exact, tmp_path / "exact", every=10), Recorder(short, tmp_path / "short", every=10, dtype=dtype):
        for _ in drifting(model, 100):
            exact.update()
            short.update()
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("exact", "short")]
    assert sizes[1] < (0.7 if dtype == "float32" else 0.5) * sizes[0]
    right = {snapshot.path.name: snapshot for snapshot in Store(tmp_path / "exact").snapshots}
    targets = [("ema_debiased", {"decay": 0.97}), ("power", {"sigma_rel": 0.15}), ("power", {"sigma_rel": 0.1})]
    for target, settings in targets:
        made = quietly(tmp_path / "short", target, **settings)
        assert made.rounding == pytest.approx(made.amplification * unit)
        exactly = {
            name: sum(x * right[file].read_weights(name) for file, x in made.coefficients.items())
            for name in made.state_dict
        }
        measured = relative(flat(made.state_dict), flat(exactly))
        assert measured < 2 * made.rounding
        assert measured > made.rounding / 100  # the figure is no wild exaggeration either
        assert made.state_dict["weight"].dtype == torch.float64


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16", "float32", "float64"])
def test_complex_weights_are_stored_in_any_dtype(tmp_path, dtype):
    model = ZOO["complex"].build()
    tail = polyak.average(model, "swa", start=11)
    averager = polyak.average(model, "ema", decay=0.9)
    with Recorder(averager, tmp_path, every=5, dtype=dtype):
        for _ in drifting(model, 20):
            averager.update()
            tail.update()
    made = quietly(tmp_path, "swa", start=11)
    for key, tensor in made.state_dict.items():
        assert tensor.dtype == tail.averages[key].dtype
        torch.testing.assert_close(tensor, tail.averages[key], rtol=0, atol=8 * max(made.rounding, 2**-22))


def test_tensors_that_are_left_out_are_those_of_the_model_at_the_last_snapshot(tmp_path):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9, exclude="2.*")
    with Recorder(averager, tmp_path, every=5):
        for _ in drifting(model, 20):
            averager.update()
    assert "2.weight" not in averager.averages
    made = quietly(tmp_path, "swa", start=11)
    assert torch.equal(made.state_dict["2.weight"], model[2].weight)
    assert not torch.equal(made.state_dict["0.weight"], model[0].weight)
    mlp().load_state_dict(made.state_dict, strict=True)


def test_buffers_that_are_left_out_or_not_part_of_the_state_are_no_hindrance(tmp_path):
    model = ZOO["buffers"].build()
    recorded(tmp_path, model, buffers="skip")
    made = quietly(tmp_path, "swa")
    assert "transient" not in made.state_dict
    assert torch.equal(made.state_dict["running"], model.running)
    ZOO["buffers"].build().load_state_dict(made.state_dict, strict=True, assign=True)


def test_a_mapping_is_a_model_and_gets_its_own_names_back(tmp_path):
    model = {"a/b": torch.zeros(2), "count": torch.tensor(0)}
    averager = polyak.average(model, "ema", decay=0.5)
    with Recorder(averager, tmp_path, every=2):
        for step in range(1, 7):
            model["a/b"].fill_(step)
            model["count"].fill_(step)
            averager.update()
    made = synthesize(tmp_path, "swa", start=3)
    assert {*made.state_dict} == {"a/b", "count"}
    assert made.state_dict["a/b"].tolist() == [4.5, 4.5]
    assert made.state_dict["count"].item() == 6


def test_a_wrapped_model_has_the_names_of_the_bare_one(tmp_path):
    model = mlp()
    averager = polyak.average(nn.DataParallel(model), "ema", decay=0.9)
    with Recorder(averager, tmp_path, every=5):
        for _ in drifting(model, 10):
            averager.update()
    mlp().load_state_dict(quietly(tmp_path, "swa").state_dict, strict=True)


def test_a_snapshot_is_of_the_average_even_while_the_model_holds_it(tmp_path):
    model = mlp()
    averager = polyak.average(model, "ema", decay=0.9, exclude="2.*")
    recorder = Recorder(averager, tmp_path, every=50, blocks=False)
    for _ in drifting(model, 7):
        averager.update()
    expected = averager.averages["0.weight"].clone()
    with averager.applied():
        recorder.close()
    made = synthesize(tmp_path, "ema", decay=0.9)
    assert torch.equal(made.state_dict["0.weight"], expected)


def test_snapshots_of_different_models_are_not_combined(tmp_path):
    recorded(tmp_path, mlp(), steps=5)
    recorded(tmp_path / "b", Tied(), steps=10)
    (tmp_path / "b" / "average-000000000010.safetensors").rename(tmp_path / "average-000000000010.safetensors")
    with pytest.raises(polyak.StateError, match="are of different models"):
        synthesize(tmp_path, "swa")
