"""The averaged module under tools: surgery, compilers, scripts, exports, pickles, other libraries."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import polyak
from held_modules import Scaled, applied, everything
from models import Conv, bits, drifting, mlp

# In-place tools


def _half(module):
    module.half()


def _surgery(module):
    module[2] = nn.Identity()


def _weights(module):
    module[0].weight = nn.Parameter(torch.zeros(5, 3))


@pytest.mark.parametrize("tool", [_half, _surgery, _weights])
def test_after_a_tool_in_place_another_module_is_built(tool):
    model, x = mlp(), torch.randn(2, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    changed = averager.module
    tool(changed)
    for _ in drifting(model, 1):
        averager.update()
    assert torch.equal(averager(x), applied(averager, lambda: model(x)))
    assert averager.module is not changed
    assert type(averager.module[2]) is nn.Linear


def test_a_parametrisation_removed_from_the_module_stays_on_the_model():
    model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))), torch.randn(2, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    nn.utils.parametrize.remove_parametrizations(averager.module[0], "weight")
    for _ in drifting(model, 1):
        averager.update()
    assert model[0].weight.shape == (4, 3)
    assert torch.equal(averager(x), applied(averager, lambda: model(x)))


# What leaves is a plain module


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_script_a_copy_and_an_export_compute_the_same(dtype):
    model, x = Conv(), torch.randn(2, 3, 8, 8)
    averager = polyak.average(model, "ema", decay=0.5, dtype=dtype)
    teacher = averager.module
    for _ in drifting(model, 2):
        averager.update()
    expected = averager(x)
    leaving = {
        "script": torch.jit.script(teacher),
        "trace": torch.jit.trace(teacher, x),
        "export": torch.export.export(teacher, (x,), strict=False).module(),
        "deepcopy": copy.deepcopy(teacher),
        "script of a copy": torch.jit.script(copy.deepcopy(teacher)),
        "pickle": pickle.loads(pickle.dumps(teacher)),
        "compile": torch.compile(teacher, backend="eager"),
        "parallel": nn.DataParallel(teacher),
    }
    for name, left in leaving.items():
        torch.testing.assert_close(left(x), expected, msg=name)
    for name in ("deepcopy", "pickle"):
        assert type(leaving[name]._forward_pre_hooks) is type(model._forward_pre_hooks)
        assert not leaving[name]._forward_pre_hooks
        before = {key: bits(tensor) for key, tensor in leaving[name].state_dict().items()}
        averager.update()
        assert before == {key: bits(tensor) for key, tensor in leaving[name].state_dict().items()}


def test_a_compiled_teacher_follows_updates_and_attributes():
    torch.compiler.reset()
    model, x = Scaled(), torch.randn(2, 3)
    averager = polyak.average(model.bfloat16(), "ema", decay=0.5)
    teacher, x = averager.module, x.bfloat16()
    compiled = torch.compile(teacher, backend="eager")
    step = torch.compile(lambda y: teacher(y) + teacher.layer(y), backend="eager")
    compiled(x), step(x)
    for number in drifting(model, 2):
        model.alpha = float(number)
        averager.update()
        expected = applied(averager, lambda: model(x))
        assert torch.equal(compiled(x), expected)
        assert torch.equal(step(x), expected + applied(averager, lambda: model.layer(x)))
    torch.compiler.reset()


def test_a_saved_module_loads_where_polyak_is_not_installed(tmp_path):
    model, x, file = Conv().eval(), torch.ones(1, 3, 8, 8), tmp_path / "module.pt"
    averager = polyak.average(nn.Sequential(model.conv, nn.Flatten()), "ema")
    torch.save((averager.module, averager(x)), file)
    code = (
        "import sys; sys.modules['polyak'] = None\n"
        "import torch; module, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(module(torch.ones(1, 3, 8, 8)), expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


def test_a_module_outlives_its_averager_and_keeps_no_averager_alive():
    averager, x = polyak.average(mlp(), "ema"), torch.ones(1, 3)
    teacher, expected = averager.module, averager(x)
    alive = weakref.ref(averager)
    del averager
    assert alive() is None
    assert torch.equal(teacher(x), expected)


# Other people's models


def _timm():
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 32, 32)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=2)
    return model, lambda model, dtype: model.forward_features(x.to(dtype))


def _torchvision():
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(1, 3, 32, 32)
    return torchvision.models.resnet18(num_classes=4), lambda model, dtype: model.layer1(model.conv1(x.to(dtype)))


def _t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    ids = torch.arange(1, 9)[None]
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda model, dtype: model.generate(ids, max_new_tokens=6, do_sample=False)


def _fx():
    model, run = Conv().eval(), torch.randn(2, 3, 8, 8)
    return torch.fx.symbolic_trace(model), lambda model, dtype: model.forward(run.to(dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [_timm, _torchvision, _t5, _fx])
def test_libraries_models_are_fresh_by_their_own_methods(build, dtype):
    model, run = build()
    model.to(dtype).eval()
    averager = polyak.average(model, "ema", decay=0.5)
    teacher = averager.module
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        averager.update()
    before = everything(model, averager)
    expected = applied(averager, lambda: run(model, dtype))
    with torch.no_grad():
        for mode in (False, True, False):
            teacher.train(mode)
            assert mode or torch.equal(run(teacher, dtype), expected)
    assert averager.module is teacher
    assert everything(model, averager) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("include", [None, "*lora_*"])
def test_merging_adapters_into_the_module_leaves_the_model_and_the_average_alone(include):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model, x = peft.get_peft_model(mlp(), config).eval(), torch.randn(2, 3)
    averager = polyak.average(model, "ema", decay=0.5, include=include)
    for _ in drifting(model, 2):
        averager.update()
    model.base_model.model[0].scaling["default"] = 0.3
    before, expected = everything(model, averager), applied(averager, lambda: model(x))
    teacher = averager.module
    teacher.merge_adapter()
    torch.testing.assert_close(teacher(x), expected)
    assert everything(model, averager) == before
    averager.update()
    torch.testing.assert_close(teacher(x), applied(averager, lambda: model(x)))
