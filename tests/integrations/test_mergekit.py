"""Every merge that mergekit has, too, against mergekit itself: `python3 noxfile.py -s mergekit` installs it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak import files

pytest.importorskip("mergekit", reason="the nox session mergekit installs it")

WEIGHTS = [1.0, 0.7, 0.4]
SHARES = [0.5, 0.3, 0.2]
PAIR = [0.7, 0.3]
CRUMBS = {"density": 0.8, "gamma": 0.05}
# name there, weights, inputs, whether there is a base, settings of an input there, global ones, name and settings here
CASES = [
    ("linear", SHARES, "abc", False, {}, {}, "linear", {}),
    ("linear", WEIGHTS, "abc", False, {}, {}, "linear", {"normalize": True}),
    ("task_arithmetic", WEIGHTS, "abc", True, {}, {"lambda": 0.3}, "task_arithmetic", {"lam": 0.3}),
    ("slerp", None, "ab", "a", {}, {"t": 0.3}, "slerp", {"t": 0.3}),
    ("nuslerp", PAIR, "ab", False, {}, {}, "nuslerp", {}),
    ("nuslerp", PAIR, "ab", True, {}, {}, "nuslerp", {}),
    ("nuslerp", PAIR, "ab", False, {}, {"nuslerp_flatten": False}, "nuslerp", {"scope": "row"}),
    ("nuslerp", PAIR, "ab", True, {}, {"nuslerp_flatten": False}, "nuslerp", {"scope": "row"}),
    ("nuslerp", PAIR, "ab", False, {}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, "nuslerp",
     {"scope": "column"}),
    *(("ties", WEIGHTS, "abc", True, {"density": d}, {"normalize": True}, "ties", {"density": d}) for d in (0.2, 0.5)),
    ("ties", WEIGHTS, "abc", True, {"density": 0.4}, {"normalize": True, "lambda": 0.6}, "ties",
     {"density": 0.4, "lam": 0.6}),
    ("breadcrumbs", WEIGHTS, "abc", True, CRUMBS, {}, "breadcrumbs", CRUMBS),
    ("breadcrumbs_ties", WEIGHTS, "abc", True, CRUMBS, {"normalize": True}, "breadcrumbs", {**CRUMBS, "then": "ties"}),
    ("model_stock", None, "abc", True, {}, {}, "model_stock", {}),
    ("model_stock", None, "abc", True, {}, {"filter_wise": True}, "model_stock", {"scope": "row"}),
]  # fmt: skip


@pytest.fixture
def models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (37, 53), "v": (64, 8), "b": (101,), "embedding": (200, 16)}
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made = {"base": base}
    for model in "abc":
        made[model] = {
            name: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in base.items()
        }
    for model, state in made.items():
        save_file(state, tmp_path / f"{model}.safetensors")
    return made


@pytest.fixture
def theirs(models, tmp_path):
    """Return what mergekit makes of the models."""
    from mergekit.scripts.merge_raw_pytorch import main

    def merged(method, weights, inputs, base, each, settings, seed="0"):
        rows = [{"model": str(tmp_path / f"{one}.safetensors"), "parameters": {**each}} for one in inputs]
        for row, weight in zip(rows, weights or [], strict=False):
            row["parameters"]["weight"] = weight
        config = {"models": rows, "merge_method": method, "parameters": settings, "dtype": "float64"}
        if base:
            config["base_model"] = str(tmp_path / f"{'base' if base is True else base}.safetensors")
        (tmp_path / "config.yml").write_text(json.dumps(config))  # which YAML contains
        arguments = [str(tmp_path / "config.yml"), str(tmp_path / "out"), "--quiet", "--random-seed", seed]
        main(arguments, standalone_mode=False)
        return load_file(next((tmp_path / "out").glob("*.safetensors")))

    return merged


def ours(tmp_path, method, weights, inputs, base, settings):
    paths = [tmp_path / f"{one}.safetensors" for one in inputs]
    base = tmp_path / "base.safetensors" if base is True else None
    return load_file(
        files.merge(paths, method, base=base, weights=weights, out=tmp_path / "o.safetensors", **settings).out
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[5]}-{case[7]}")
def test_every_value(case, models, theirs, tmp_path):
    there, weights, inputs, base, each, settings, here, own = case
    wanted = theirs(there, weights, inputs, base, each, settings)
    made = ours(tmp_path, here, weights, inputs, base, own)
    for name in models["base"]:
        torch.testing.assert_close(made[name], wanted[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("there", "here", "each"), [
    ("dare_linear", "dare", {"density": 0.3}), ("della_linear", "della", {"density": 0.5, "epsilon": 0.2}),
])  # fmt: skip
def test_what_is_drawn_has_the_same_chances_and_sizes(there, here, each, models, theirs, tmp_path):
    wanted = theirs(there, [1.0], "a", True, each, {})
    made = ours(tmp_path, here, [1.0], "a", True, {**each, "rescale": "l1", "then": "linear", "seed": 1})
    for name in ("w", "embedding"):
        change = models["a"][name] - models["base"][name]
        for state in (wanted, made):
            moved = state[name] - models["base"][name]
            kept = moved.abs() > 1e-12
            assert kept.double().mean() == pytest.approx(each["density"], abs=0.03)
            assert moved.abs().sum() == pytest.approx(change.abs().sum().item(), rel=1e-5)
            factors = moved[kept] / change[kept]
            assert factors.max() - factors.min() < 1e-5
        large = change.abs() > change.abs().median()
        often = [((s[name] - models["base"][name])[large].abs() > 1e-12).double().mean().item() for s in (wanted, made)]
        assert often[0] == pytest.approx(often[1], abs=0.06)
