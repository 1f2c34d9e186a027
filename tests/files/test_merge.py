"""`polyak.files.merge`: every built-in merge against its formula, its laws, and the door for plugins."""

from __future__ import annotations

import json
from itertools import product
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import polyak
from polyak import files
from polyak.errors import ConfigError, MismatchError, NonFiniteError, PluginError, UnknownMergeError
from polyak.merges import BUILT_IN, About
from polyak.registry import Registry
from polyak.testing import check_merge

SETTINGS = {"fisher": {"importance": ("a", "b", "c")}, "trimmed_mean": {"trim": 1}}
VARIANTS = [
    *((cls.model_fields["name"].default, SETTINGS.get(cls.model_fields["name"].default, {})) for cls in BUILT_IN),
    *(("ties", {"density": 0.5, "scope": s, "elect": e, "divide": d, "keep": k, "zero": z})
      for s, e, d, k, z in product(("tensor", "model"), ("mass", "weighted_mass", "count"), ("weights", "count"),
                                   ("exact", "at_least"), ("positive", "majority"))),
    *(("dare", {"density": 0.5, "rescale": r, "then": t})
      for r, t in product(("density", "l1", "none"), ("linear", "ties"))),
    *(("della", {"rescale": r, "then": t}) for r, t in product(("density", "l1", "none"), ("linear", "ties"))),
    ("slerp", {"scope": "model"}), ("nuslerp", {"scope": "row"}), ("nuslerp", {"scope": "column"}),
    ("model_stock", {"scope": "row"}),
    ("geometric_median", {"scope": "model"}), ("breadcrumbs", {"then": "ties"}),
]  # fmt: skip


def written(tmp_path, *tensors, base=None, dtype=torch.float64):
    """Write one tensor `w` per file; return the paths and the options of a base."""
    paths = []
    for number, values in enumerate(tensors):
        paths.append(tmp_path / f"in{number}.safetensors")
        save_file({"w": torch.as_tensor(values, dtype=dtype)}, paths[-1])
    if base is None:
        return paths, {}
    save_file({"w": torch.as_tensor(base, dtype=dtype)}, tmp_path / "base.safetensors")
    return paths, {"base": tmp_path / "base.safetensors"}


def merged(tmp_path, tensors, method, base=None, **options):
    paths, more = written(tmp_path, *tensors, base=base)
    out = tmp_path / "merged.safetensors"
    files.merge(paths, method, out=out, **more, **options)
    return load_file(out)["w"]


A, B, ZERO = (1.0, 2.0, 3.0), (3.0, -1.0, 0.5), (0.0, 0.0, 0.0)
T = (
    (0.5, -0.2, 0.1, 0.8, -0.6, 0.05), (-0.4, -0.3, 0.2, 0.7, 0.1, -0.9), (0.3, 0.1, -0.15, -0.1, -0.5, 0.4),
)  # fmt: skip
PEFT = {"elect": "mass", "divide": "count"}
VECTORS = [
    ("slerp", {"t": 0.5}, (A, B), None, (2.57268407, 0.64317102, 2.25109856)),
    ("slerp", {"t": 0.25}, (A, B), None, (1.89490414, 1.40190278, 2.78511288)),
    ("slerp", {"t": 0.5, "scope": "model"}, (A, B), None, (2.57268407, 0.64317102, 2.25109856)),
    ("nuslerp", {"weights": [0.75, 0.25]}, (A, B), None, (1.89490414, 1.40190278, 2.78511288)),
    ("ties", {"density": 0.5, **PEFT}, T, (0.0,) * 6, (0.4, 0, 0, 0.75, -0.55, -0.9)),
    ("ties", {"density": 1, **PEFT}, T, (0.0,) * 6, (0.4, -0.25, 0.15, 0.75, -0.55, -0.9)),
    ("ties", {"density": 0.5, "scope": "model", **PEFT}, T, (0.0,) * 6, (0.4, 0, 0, 0.75, -0.55, -0.9)),
    ("model_stock", {}, (A, (2.0, 1.0, 2.0)), ZERO, (1.41342942, 1.41342942, 2.35571569)),
    ("median", {}, (A, B, (100, 0, 1), (1.5, 1, 1)), None, (2.25, 0.5, 1)),
    ("trimmed_mean", {"trim": 1}, (A, B, (100, 0, 1), (1.5, 1, 1)), None, (2.25, 0.5, 1)),
    ("geometric_median", {}, (A, B, (100, 0, 1), (1.5, 1, 1)), None, (2.22729454, 0.72222384, 1.26449623)),
    ("geometric_median", {"scope": "model"}, (A, B, (100, 0, 1), (1.5, 1, 1)), None,
     (2.22729454, 0.72222384, 1.26449623)),
    ("linear", {"weights": [0.25, 0.75]}, (A, B), None, (2.5, -0.25, 1.125)),
    ("task_arithmetic", {"lam": 0.5}, (A, B), (1.0, 1.0, 1.0), (2.0, 0.5, 1.75)),
    ("task_arithmetic", {"weights": [2.0, 1.0]}, (A, B), ZERO, (5.0, 3.0, 6.5)),
    ("magnitude_prune", {"density": 0.34}, (A, B), ZERO, (3.0, 0.0, 3.0)),
    ("breadcrumbs", {"density": 0.34, "gamma": 0.34}, (A, B), ZERO, (0.0, 1.0, 0.0)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "tensors", "base", "wanted"), VECTORS)
def test_reference_vectors(method, options, tensors, base, wanted, tmp_path):
    made = merged(tmp_path, tensors, method, base=base, **options)
    assert_close(made, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=6e-9)


def test_importance(tmp_path):
    importance = []
    for number, values in enumerate(((1.0, 4.0, 0.25), (1.0, 1.0, 1.0))):
        importance.append(str(tmp_path / f"f{number}.safetensors"))
        save_file({"w": torch.tensor(values)}, importance[-1])
    made = merged(tmp_path, (A, B), "fisher", importance=importance)
    assert_close(made, torch.tensor((2.0, 1.4, 1.0), dtype=torch.float64))
    with pytest.raises(ConfigError, match="1 further files for 2 inputs"):
        merged(tmp_path, (A, B), "fisher", importance=importance[:1])
    save_file({"w": torch.ones(2)}, importance[1])
    with pytest.raises(MismatchError, match=r"f1\.safetensors' has shape \(2,\)"):
        merged(tmp_path, (A, B), "fisher", importance=importance)


def test_ties_as_peft_computes_it(tmp_path):
    peft = pytest.importorskip("peft.utils.merge_utils")
    tensors = [torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = torch.tensor([0.5, 1.0, 2.0])
    for density, elect, method in product((0.2, 0.73), ("mass", "count"), ("total", "frequency")):
        if (elect, method) not in {("mass", "total"), ("count", "frequency")}:
            continue
        wanted = peft.ties([*tensors], weights, density, method)
        made = merged(
            tmp_path, tensors, "ties", base=torch.zeros(40, 30), density=density, elect=elect, divide="count", least=0,
            weights=weights.tolist(),
        )  # fmt: skip
        assert_close(made.float(), wanted)
    wanted = peft.magnitude_prune([*tensors], weights, 0.3)
    made = merged(tmp_path, tensors, "magnitude_prune", base=torch.zeros(40, 30), density=0.3, weights=weights.tolist())
    assert_close(made.float(), wanted)


def test_ties_as_the_papers_code_computes_it(tmp_path):
    torch.manual_seed(0)
    base = {"a": torch.randn(20, 7).double(), "b": torch.randn(31).double()}
    states = [{name: x + torch.randn_like(x) for name, x in base.items()} for _ in range(3)]
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    save_file(base, tmp_path / "base.safetensors")

    changes = torch.stack([torch.cat([(s[n] - base[n]).flatten() for n in base]) for s in states])
    total = changes.shape[1]
    limits = changes.abs().kthvalue(total - int(0.2 * total), dim=1, keepdim=True).values
    kept = changes * (changes.abs() >= limits)
    signs = kept.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    rows = torch.where(signs > 0, kept > 0, kept < 0)
    wanted = (kept * rows).sum(0) / (rows & (kept != 0)).sum(0).clamp(min=1)

    made = files.merge(
        [tmp_path / f"{i}.safetensors" for i in range(3)], "ties", base=tmp_path / "base.safetensors", density=0.2,
        scope="model", keep="at_least", elect="mass", divide="count", zero="majority", out=tmp_path / "o.safetensors",
    )  # fmt: skip
    state = load_file(made.out)
    got = torch.cat([(state[n] - base[n]).flatten() for n in base])
    assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_dare_is_task_arithmetic_on_average_and_l1_keeps_the_norm(tmp_path):
    change = torch.randn(300, 400, dtype=torch.float64)
    base = torch.zeros_like(change)
    made = torch.stack([merged(tmp_path, (change,), "dare", base=base, density=0.5, seed=seed) for seed in range(20)])
    assert (made.mean(0) - change).abs().mean() < 0.25
    assert set((made[0] / change).round(decimals=9).unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(made[0], made[1])
    l1 = merged(tmp_path, (change,), "dare", base=base, density=0.1, rescale="l1")
    assert l1.abs().sum() == pytest.approx(change.abs().sum())
    assert ((l1 != 0).double().mean() - 0.1).abs() < 0.01


def test_della_keeps_large_values_more_often(tmp_path):
    change = torch.linspace(0.1, 1, 100, dtype=torch.float64).repeat(400, 1)
    made = merged(tmp_path, (change,), "della", base=torch.zeros_like(change), density=0.5, epsilon=0.3, then="linear")
    often = (made != 0).double().mean(0)
    assert_close(often[:10].mean().item(), 0.2 + 0.6 * 4.5 / 99, atol=0.03, rtol=0)
    assert_close(often[-10:].mean().item(), 0.2 + 0.6 * 94.5 / 99, atol=0.03, rtol=0)
    assert_close(made.mean(), change.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("scope", ["row", "column"])
def test_nuslerp_of_rows_and_columns_is_that_of_each_vector(scope, tmp_path):
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    settings = {"weights": [0.75, 0.25]}
    made = merged(tmp_path, (a, b), "nuslerp", scope=scope, **settings)
    along = 0 if scope == "row" else 1
    vectors = zip(a.unbind(along), b.unbind(along), strict=True)
    wanted = [merged(tmp_path, (x.clone(), y.clone()), "nuslerp", **settings) for x, y in vectors]
    assert_close(made, torch.stack(wanted, along), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 7), (2, 300_000), (300_000,), (5, 1), (2, 4, 6)])
def test_della_ranks_each_row_also_where_it_is_longer_than_a_block(shape, tmp_path, monkeypatch):
    asked = []
    uniform = polyak.merges.about.About.uniform

    def recorded(about, number=0):
        asked.append(uniform(about, number))
        return asked[-1]

    monkeypatch.setattr(polyak.merges.about.About, "uniform", recorded)
    change = torch.randn(shape, dtype=torch.float64)
    settings = {"density": 0.5, "epsilon": 0.4, "then": "linear", "rescale": "none"}
    made = merged(tmp_path, (change,), "della", base=torch.zeros_like(change), **settings)
    length = shape[-1]
    ranks = change.abs().argsort(-1).argsort(-1).double()
    chances = 0.1 + 0.8 * ranks / (length - 1) if length > 1 else torch.full(shape, 0.5, dtype=torch.float64)
    kept = torch.cat(asked).reshape(shape) < chances
    assert_close(made, torch.where(kept, change, 0.0), rtol=0, atol=0)


def test_della_gives_equal_values_equal_chances(tmp_path):
    change = torch.ones(200, 100, dtype=torch.float64)
    made = merged(tmp_path, (change,), "della", base=torch.zeros_like(change), density=0.5, epsilon=0.4, then="linear")
    assert made.unique().tolist() == [0.0, 2.0]  # by position the first values would have the chance 0.1
    assert ((made[:, :10] != 0).double().mean() - 0.5).abs() < 0.05


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_model_stock_refuses_changes_that_cancel_each_other(scope, tmp_path):
    angles = torch.tensor([0.0, 2 * torch.pi / 3, 4 * torch.pi / 3])
    states = [torch.stack([angle.cos(), angle.sin()]).reshape(1, 2) for angle in angles]
    with pytest.raises(ConfigError, match=r"'w' cancel each other \(mean cosine -0\.5\).*use 'linear'"):
        merged(tmp_path, states, "model_stock", base=torch.zeros(1, 2), scope=scope)


def test_a_base_that_is_an_input_is_noted(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.randn(4, 4)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    made = files.merge(paths, "ties", base=paths[0], out=tmp_path / "o.safetensors")
    assert made.notes == ("a.safetensors is an input and the base, so its change is zero",)


@pytest.mark.parametrize(
    ("cls", "where"),
    [(cls, where) for cls in BUILT_IN for where in ("input", "base") if where == "input" or cls.base == "required"],
)
def test_a_nan_that_is_let_in_is_in_the_result(cls, where, tmp_path):
    method = cls.model_fields["name"].default
    count = cls.inputs[1] or 3
    states = [torch.randn(6, 8) for _ in range(count + 1)]
    states[0 if where == "input" else count][2, 3] = torch.nan
    paths = [tmp_path / f"{number}.safetensors" for number in range(count + 1)]
    for path, state in zip(paths, states, strict=True):
        save_file({"w": state}, path)
    settings = {**SETTINGS.get(method, {}), "nonfinite": "propagate"}
    if method == "fisher":
        for name in "abc":
            save_file({"w": torch.rand(6, 8)}, tmp_path / f"{name}.safetensors")
        settings["importance"] = tuple(str(tmp_path / f"{name}.safetensors") for name in "abc")
    base = paths[-1] if cls.base == "required" else None
    made = files.merge(paths[:count], method, base=base, out=tmp_path / "o.safetensors", **settings)
    assert load_file(made.out)["w"][2, 3].isnan()


@pytest.mark.parametrize(("method", "settings"), VARIANTS)
def test_the_laws(method, settings):
    check_merge(method, **settings)


def test_the_laws_find_what_is_broken():
    class Broken(files.Merge):
        name: Literal["broken"] = "broken"
        base = "required"
        elementwise = True

        def merge(self, tensors, base, about):
            return tensors[0] * tensors[0].abs().mean() + torch.rand(1)

    with pytest.raises(AssertionError) as caught:
        check_merge(Broken)
    for law in ("fixed point", "permuted", "pieces", "shift", "seed"):
        assert law in str(caught.value)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ties", {}), ("ties", {"scope": "model"}), ("dare", {}), ("dare", {"rescale": "l1"}), ("linear", {}),
        ("geometric_median", {"scope": "model"}), ("slerp", {"scope": "model"}), ("median", {}),
    ],
)  # fmt: skip
def test_threads_and_pieces_change_no_bit(method, settings, tmp_path):
    torch.manual_seed(0)
    shapes = {"a": (300_000,), "b": (7, 11), "c": ()}
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for path in paths:
        torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, path)
    base = {"base": paths[2]} if files.merges()[method].base == "required" else {}
    made = []
    for threads in (1, 3):
        out = files.merge(paths[:2], method, **base, out=tmp_path / f"o{threads}.pt", threads=threads, **settings).out
        made.append(torch.load(out, weights_only=True))
    assert all(torch.equal(made[0][name], made[1][name]) for name in shapes)


def test_folders_integers_dtypes_and_the_metadata(tmp_path):
    states = [{"w": torch.full((2, 2), float(i), dtype=torch.bfloat16), "n": torch.tensor(i)} for i in range(3)]
    for i, state in enumerate(states):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"of": i}))
    made = files.merge(
        [tmp_path / "m1", tmp_path / "m2"], "ties", base=tmp_path / "m0", out=tmp_path / "o", density=1, seed=5
    )
    with files.open(made.out) as checkpoint:
        assert checkpoint.read("w").tolist() == [[1.5, 1.5], [1.5, 1.5]]
        assert checkpoint.dtype("w") == torch.bfloat16
        assert checkpoint.read("n") == 2
        kind, about = checkpoint.made
    assert kind == "polyak_merge"
    assert about["method"]["name"] == "ties"
    assert about["seed"] == 5
    assert len(about["inputs"]) == 3
    assert json.loads((made.out / "config.json").read_text()) == {"of": 2}


def test_mistakes(tmp_path):
    paths, more = written(tmp_path, A, B, base=ZERO)
    out = {"out": tmp_path / "o.safetensors"}
    for kind, match, call in (
        (UnknownMergeError, "Did you mean 'ties'", lambda: files.merge(paths, "tis", **out)),
        (ConfigError, "needs the checkpoint", lambda: files.merge(paths, "ties", **out)),
        (ConfigError, "takes no base", lambda: files.merge(paths, "linear", **more, **out)),
        (ConfigError, "merges 2 files; got 3", lambda: files.merge([*paths, more["base"]], "slerp", **out)),
        (ConfigError, "takes no weights", lambda: files.merge(paths, "median", weights=[0.5, 0.5], **out)),
        (ConfigError, "add up to 3", lambda: files.merge(paths, "linear", weights=[1, 2], **out)),
        (ConfigError, "1 numbers for 2", lambda: files.merge(paths, "ties", weights=[1], **more, **out)),
        (ConfigError, "density: Input should be less", lambda: files.merge(paths, "ties", density=2, **more, **out)),
        (ConfigError, "there is no such setting", lambda: files.merge(paths, "ties", densty=1, **more, **out)),
        (ConfigError, "leaves the chances", lambda: files.merge(paths, "della", density=0.95, **more, **out)),
        (ConfigError, "expected finite numbers", lambda: files.merge(paths, "linear", weights=5, **out)),
        (ConfigError, "leave none of", lambda: files.merge([*paths, more["base"]], "trimmed_mean", trim=2, **out)),
    ):
        with pytest.raises(kind, match=match):
            call()
        assert not out["out"].exists()


def test_a_merge_that_makes_nan_or_another_shape(tmp_path):
    class Wrong(files.Merge):
        name: Literal["wrong"] = "wrong"
        how: str

        def merge(self, tensors, base, about):
            made = {"nan": tensors[0] * float("nan"), "short": tensors[0][:1], "none": None}
            return made[self.how]

    paths, _ = written(tmp_path, A, B)
    for how, kind, match in (
        ("nan", NonFiniteError, "made a NaN"),
        ("short", ConfigError, "returned shape"),
        ("none", ConfigError, "returned None"),
        ("raises", ConfigError, "KeyError"),
    ):
        with pytest.raises(kind, match=match):
            files.merge(paths, Wrong(how=how), out=tmp_path / "o.safetensors")
        assert not (tmp_path / "o.safetensors").exists()


class First(files.Merge):
    """The first input."""

    name: Literal["first"] = "first"
    elementwise = True

    def merge(self, tensors, base, about):
        return tensors[0]


class Plugin:
    @polyak.hookimpl
    def polyak_merges(self):
        return [First]


def test_plugins_offer_merges_by_the_same_door():
    registry = Registry(points=[])
    registry.register(Plugin(), "dist-a")
    assert registry.resolve_merge("first") is First
    assert registry.merges().distribution("first") == "dist-a"
    registry.register(Plugin(), "dist-b")
    with pytest.raises(UnknownMergeError, match="'dist-a:first' or 'dist-b:first'"):
        registry.resolve_merge("first")
    assert registry.resolve_merge("dist_b:first") is First
    assert {"dist-a:first", "dist-b:first"} <= {*registry.merges()}

    class Wrong:
        @polyak.hookimpl
        def polyak_merges(self):
            return [polyak.EMA]

    with pytest.raises(PluginError, match=r"expected classes derived from polyak\.files\.Merge"):
        registry.register(Wrong(), "wrong")


def test_random_numbers_depend_on_their_place_only():
    about = About("w", (1000,), 0, 1000, (1.0,), seed=3)
    whole = about.uniform(1)
    assert torch.equal(whole[300:700], About("w", (1000,), 300, 400, (1.0,), seed=3).uniform(1))
    others = (about.uniform(0), About("v", (1000,), 0, 1000, (1.0,), seed=3).uniform(1),
              About("w", (1000,), 0, 1000, (1.0,), seed=4).uniform(1))  # fmt: skip
    assert all((whole == other).sum() == 0 for other in others)
    many = About("w", (10**6,), 0, 10**6, (1.0,)).uniform()
    assert 0 <= many.min() < 1e-5
    assert 1 - 1e-5 < many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert torch.corrcoef(torch.stack([many[1:], many[:-1]]))[0, 1].abs() < 3e-3
