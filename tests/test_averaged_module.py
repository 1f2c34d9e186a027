"""`averager.module`, held: whatever computes with it computes what `applied()` would, and changes nothing else."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import polyak
from models import ZOO, Conv, average_bits, bits, drifting, mlp, model_bits
from polyak.engine.averaged_module.module import AveragedModule
from polyak.engine.plan import plan as plans

KINDS = [pytest.param(kind, id=str(kind)) for kind in ZOO.values() if kind.name != "shapes"]


def applied(averager, run):
    """Return what the model computes with the average inside, in eval mode."""
    with torch.no_grad(), averager.applied():
        return run()


def everything(model, averager):
    return model_bits(model), average_bits(averager), [module.training for module in model.modules()]


@pytest.fixture
def passes(monkeypatch):
    """Count how often averages are written into a module."""
    counted = []
    write = AveragedModule._write
    monkeypatch.setattr(AveragedModule, "_write", lambda *args: (counted.append(1), write(*args))[1])
    return counted


class Staged(nn.Module):
    """A model with a method next to `forward`, and a parameter that no submodule owns."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def features(self, x):
        return self.encoder(x) + self.offset

    def forward(self, x):
        return self.head(self.features(x))


# Held: fresh by every method, submodule and form


@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"dtype": "bfloat16"}, {"buffers": "copy"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_held_module_is_fresh_by_every_method_and_submodule(dtype, options):
    model = Staged().to(dtype).eval()
    averager = polyak.average(model, "ema", decay=0.5, **options)
    teacher, x = averager.module, torch.randn(5, 3, dtype=dtype)
    encoder, weight = teacher.encoder, teacher.head.weight
    for _ in drifting(model, 3):
        averager.update()
        with torch.no_grad():
            assert torch.equal(teacher.features(x), applied(averager, lambda: model.features(x)))
            assert torch.equal(encoder(x), applied(averager, lambda: model.encoder(x)))
            assert torch.equal(weight, applied(averager, lambda: model.head.weight.clone()))
    state = averager.state_dict()
    for _ in drifting(model, 2, seed=7):
        averager.update()
    averager.load_state_dict(state)
    assert torch.equal(teacher.features(x), applied(averager, lambda: model.features(x)))
    with averager.applied():
        assert torch.equal(teacher.features(x), model.features(x))
    assert averager.module is teacher


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_module_of_every_kind_is_fresh_after_each_update(kind):
    model = kind.build().eval()
    averager = polyak.average(model, "ema", decay=0.5)
    forward, x = averager.module.forward, kind.example()
    for _ in drifting(model, 2):
        averager.update()
        with torch.no_grad():
            assert torch.equal(forward(x), applied(averager, lambda: model(x)))


def test_the_modules_of_a_bank_are_fresh():
    model, x = Staged().bfloat16().eval(), torch.randn(2, 3).bfloat16()
    bank = polyak.bank(model, {"short": {"name": "ema", "decay": 0.5}, "mean": "swa", "window": "lawa"})
    teachers = {name: averager.module for name, averager in bank.items()}
    for _ in drifting(model, 3):
        bank.update()
        for name, teacher in teachers.items():
            assert torch.equal(teacher.features(x), applied(bank[name], lambda: model.features(x)))


def test_the_module_of_an_average_that_lives_elsewhere_is_fresh_when_update_returns(monkeypatch):
    monkeypatch.setattr(plans, "crosses", lambda average, live: True)
    model, x = Staged().bfloat16().eval(), torch.randn(2, 3).bfloat16()
    averager = polyak.average(model, "ema", decay=0.5)
    averager.update()
    assert averager.core.pending is not None  # nobody holds the module: the update runs in the background
    teacher = averager.module
    for _ in drifting(model, 3):
        averager.update()
        features = teacher.features(x)
        assert torch.equal(features, applied(averager, lambda: model.features(x)))


def test_a_module_is_fresh_before_the_first_update_that_counts():
    model, x = Staged().eval(), torch.randn(2, 3)
    averager = polyak.average(model, "swa", start=10)
    teacher = averager.module
    for _ in drifting(model, 2):
        averager.update()
        assert torch.equal(teacher.features(x), model.features(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_held_module_is_fresh_while_other_averages_of_its_model_are_applied(dtype):
    model, x = Staged().to(dtype).eval(), torch.randn(2, 3, dtype=dtype)
    short, long = polyak.average(model, "ema", decay=0.5), polyak.average(model, "ema", decay=0.9)
    teacher = short.module
    for _ in drifting(model, 2):
        short.update()
        long.update()
    expected = teacher.features(x)
    with short.applied():
        assert torch.equal(teacher.features(x), expected)
        with long.applied():
            assert torch.equal(teacher.features(x), expected)
        assert torch.equal(teacher.features(x), expected)
    assert torch.equal(teacher.features(x), expected)


def test_only_what_is_held_is_converted_and_once_per_update(passes):
    model, x = Staged().bfloat16().eval(), torch.randn(2, 3).bfloat16()
    averager = polyak.average(model, "ema", decay=0.5)

    def written():
        passes.clear()
        averager.update()
        at_once = len(passes)
        averager(x), averager.module(x), averager.module.features(x)
        return at_once, len(passes)

    averager.update()
    assert not passes
    averager(x)
    assert written() == (0, 1)
    for hold in (
        lambda: averager.module,
        lambda: averager.module.encoder,
        lambda: averager.module.head.weight,
        lambda: averager.module.features,
        lambda: [*averager.module.parameters()][-1],
        lambda: torch.compile(averager.module, backend="eager"),
    ):
        held = hold()
        assert written() == (1, 1)
        del held
        assert written() == (0, 1)


def test_what_interrupts_a_refresh_leaves_a_module_that_the_next_one_completes(monkeypatch):
    model, x = nn.Sequential(Merging(3), nn.BatchNorm1d(3)).bfloat16(), torch.randn(2, 3).bfloat16()
    averager = polyak.average(model, "ema", decay=0.5)
    teacher, take = averager.module, AveragedModule._take

    def interrupted(*args):
        take(*args)
        raise KeyboardInterrupt

    for _ in drifting(model, 1):
        with monkeypatch.context() as patch:
            patch.setattr(AveragedModule, "_take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                averager.update()
    assert averager.n == 1
    assert not any(part.training for part in teacher.modules())
    model.eval()
    expected = applied(averager, lambda: model(x))
    torch.testing.assert_close(teacher(x), expected)


# Attributes


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.alpha = nn.Linear(3, 3), 1.0
        self.scaling, self.stages = {"default": 1.0}, [[1.0]]
        self.act = lambda y: y * self.alpha

    def forward(self, x):
        return self.act(self.layer(x)) * self.scaling["default"] * self.stages[0][0]


def _alpha(model):
    model.alpha = 3.0


def _scaling(model):
    model.scaling["default"] = 0.25


def _stages(model):
    model.stages[0][0] = 7.0


def _act(model):
    model.act = torch.tanh


@pytest.mark.parametrize("change", [_alpha, _scaling, _stages, _act])
@pytest.mark.parametrize("look", ["update", "module", "call", "root"])
def test_attributes_are_as_of_the_last_update_access_or_call(change, look):
    model, x = Scaled(), torch.randn(2, 3)
    averager = polyak.average(model, "ema", decay=0.5)
    teacher = averager.module
    teacher(x)
    change(model)
    if look == "update":
        averager.update()
        result = teacher.forward(x)
    elif look == "module":
        result = averager.module.forward(x)
    else:
        result = averager(x) if look == "call" else teacher(x)
    assert torch.equal(result, applied(averager, lambda: model(x)))


def test_an_attribute_set_on_the_module_stays_until_the_model_s_changes():
    model = Scaled()
    averager = polyak.average(model, "ema")
    teacher = averager.module
    teacher.alpha = 9.0
    averager.update()
    assert averager.module.alpha == 9.0
    assert model.alpha == 1.0
    model.alpha = 2.0
    averager.update()
    assert teacher.alpha == 2.0
    del model.alpha
    averager.update()
    assert not hasattr(teacher, "alpha")


def test_what_is_neither_module_nor_tensor_nor_container_is_shared():
    class Buffer:
        items = ()

    model = mlp()
    model.replay, model.optimizer = Buffer(), torch.optim.Adam(model.parameters())
    model.seen = [Buffer(), model[0]]
    averager = polyak.average(model, "ema")
    teacher = averager.module
    assert teacher.replay is model.replay
    assert teacher.optimizer is model.optimizer
    assert teacher.seen[0] is model.seen[0]
    assert teacher.seen[1] is teacher[0]


def test_a_helper_that_refers_to_the_model_is_copied_with_it():
    class Helper:
        def __init__(self, module):
            self.module = module

        def __call__(self, x):
            return self.module[0](x)

    class Net(nn.Sequential):
        def forward(self, x):
            return self.helper(x)

    model, x = Net(nn.Linear(3, 3)), torch.randn(2, 3)
    model.helper = Helper(model)
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 1):
        averager.update()
    assert torch.equal(averager(x), applied(averager, lambda: model(x)))


# Using it changes neither the model nor the average


class Merging(nn.Linear):
    """A LoRA layer that merges its weights in eval mode, in place."""

    def __init__(self, size):
        super().__init__(size, size)
        self.down, self.up = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(size, 2))
        self.merged = False
        self.weight.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Deploying(nn.Module):
    """A root that folds a scale into a layer below it in eval mode."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(2.0))
        self.folded = False

    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.folded:
            self.layer.weight.data.mul_(self.scale.data)
            self.folded = True
        return self

    def forward(self, x):
        weight = self.layer.weight if self.folded else self.layer.weight * self.scale
        return functional.linear(x, weight, self.layer.bias)


REWRITING = {
    "merging": lambda: nn.Sequential(Merging(3), nn.ReLU(), Merging(3)),
    "deploying": Deploying,
}


@pytest.mark.parametrize("build", REWRITING.values(), ids=REWRITING)
@pytest.mark.parametrize("options", [{}, {"include": "adapters"}, {"dtype": "float64"}], ids=str)
def test_a_module_that_merges_weights_in_eval_mode_leaves_the_model_and_the_average_alone(build, options):
    model, x = build(), torch.randn(2, 3)
    if "include" in options:
        options = {"include": ["scale"] if build is Deploying else ["*down", "*up"]}
    averager = polyak.average(model, "ema", decay=0.5, **options)
    for _ in drifting(model, 3):
        averager.update()
        before, expected = everything(model, averager), applied(averager, lambda: model(x))
        teacher = averager.module
        for mode in (True, False, False, True, False):
            torch.testing.assert_close(teacher.train(mode)(x), expected)
            torch.testing.assert_close(averager(x), expected)
        assert everything(model, averager) == before


@pytest.mark.parametrize("buffers", ["auto", "skip", "copy", "average"])
def test_a_teacher_in_train_mode_moves_neither_the_model_s_nor_the_average_s_statistics(buffers):
    model = Conv()
    averager = polyak.average(model, "ema", decay=0.5, buffers=buffers)
    for _ in drifting(model, 1):
        averager.update()
    before, x = everything(model, averager), torch.randn(4, 3, 8, 8)
    teacher = averager.module.train()
    teacher(x + 3)
    assert everything(model, averager) == before
    model.eval()
    if buffers == "skip":
        own = teacher.norm.running_mean.clone()
        averager.update()
        assert torch.equal(teacher.eval().norm.running_mean, own)  # a mean teacher's own statistics
        assert torch.equal(averager.module.norm.running_mean, own)
    else:
        assert torch.equal(teacher.eval()(x), applied(averager, lambda: model(x)))


def test_skipped_buffers_follow_the_model_s_until_the_module_writes_its_own():
    model = Conv().eval()
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip")
    teacher, x = averager.module, torch.randn(4, 3, 8, 8)
    for _ in drifting(model, 2):
        averager.update()
        assert torch.equal(teacher.norm(x[:, [0, 1, 2, 0]]), applied(averager, lambda: model.norm(x[:, [0, 1, 2, 0]])))


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_forwards_of_the_module_write_nothing_of_the_model_or_the_average(kind):
    model = kind.build()
    averager = polyak.average(model, "ema", decay=0.5, buffers="skip" if kind.name == "conv" else "auto")
    averager.update()
    before = everything(model, averager)
    teacher = averager.module
    for mode in (True, False, True):
        teacher.train(mode)
        teacher(kind.example())
        averager.module.zero_grad()
        teacher.state_dict()
    assert everything(model, averager) == before


def test_parameters_that_are_not_averaged_share_the_model_s_memory_and_follow_it():
    model = mlp()
    model[0].requires_grad_(False)
    averager = polyak.average(model, "ema", include="2.*")
    teacher = averager.module
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averager.update()
    assert torch.equal(teacher[0].weight, model[0].weight)
    model[0].weight = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
    teacher(torch.ones(1, 3))
    assert torch.equal(teacher[0].weight, model[0].weight)
    assert teacher[0].weight is not model[0].weight
    assert teacher[0].weight.data_ptr() == model[0].weight.data_ptr()
    teacher.half()
    assert model[0].weight.dtype == torch.float32


# Hooks


def test_hooks_that_the_model_s_classes_made_compute_and_others_are_left_to_the_model():
    class Doubling(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_forward_hook(lambda module, args, result: result * 2)
            self.register_forward_pre_hook(self.shift)

        def shift(self, module, args):
            return (args[0] + self.bias,)

    model, x, seen = nn.Sequential(Doubling(), nn.Linear(3, 3)), torch.randn(2, 3), []
    averager = polyak.average(model, "ema", decay=0.5)
    for _ in drifting(model, 1):
        averager.update()
    expected = applied(averager, lambda: model(x))
    model[0].register_forward_hook(partial(lambda kept, *_: kept.append(1), seen))
    model[1].register_forward_pre_hook(lambda *_: seen.append(1))
    model.register_forward_hook(lambda *_: seen.append(1) or None)
    with pytest.warns(polyak.PolyakWarning, match=r"forward hooks .* Sequential"):
        assert torch.equal(averager(x), expected)
    assert not seen
    averager.module.register_forward_hook(lambda *_: seen.append(2))
    averager(x)
    assert seen == [2]


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
