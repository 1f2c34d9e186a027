"""The stand-ins beside the real classes: the same numbers, state dicts, and files in both directions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils as torch_theirs

from polyak.compat import (
    diffusers as diffusers_ours,
    ema_pytorch as ema_pytorch_ours,
    timm as timm_ours,
    torch as torch_ours,
    torch_ema as torch_ema_ours,
)

timm_theirs = pytest.importorskip("timm.utils", reason="timm is a test dependency, left out with the oldest torch")
torch_ema_theirs = pytest.importorskip("torch_ema", reason="as above")
diffusers_theirs = pytest.importorskip("diffusers.training_utils", reason="as above")
ema_pytorch_theirs = pytest.importorskip("ema_pytorch", reason="as above")

STEPS = 300
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Case:
    """A class and its stand-in, how both are made, and how both are updated."""

    def __init__(self, theirs, ours, make, update):
        self.classes, self.make, self.update = (theirs, ours), make, update

    def both(self, model):
        return [self.make(cls, model) for cls in self.classes]


def _modules(name, **options):
    classes = getattr(timm_theirs, name), getattr(timm_ours, name)
    with_step = name == "ModelEmaV3"
    return Case(
        *classes,
        lambda cls, model: cls(model, 0.98, **options),
        lambda ema, model, step: ema.update(model, **({"step": step} if with_step else {})),
    )


def _averaged(**options):
    return Case(
        torch_theirs.AveragedModel,
        torch_ours.AveragedModel,
        lambda cls, model: cls(model, **options),
        lambda ema, model, _: ema.update_parameters(model),
    )


def _listed(theirs, ours, method, **options):
    def update(ema, model, _):
        getattr(ema, method)(model.parameters())

    return Case(theirs, ours, lambda cls, model: cls(model.parameters(), 0.98, **options), update)


def _emas(**options):
    made = {"beta": 0.98, "update_after_step": 5, "update_every": 2, **options}
    classes = ema_pytorch_theirs.EMA, ema_pytorch_ours.EMA
    return Case(*classes, lambda cls, model: cls(model, **made), lambda ema, *_: ema.update())


TORCH_EMA = torch_ema_theirs.ExponentialMovingAverage, torch_ema_ours.ExponentialMovingAverage
DIFFUSERS = diffusers_theirs.EMAModel, diffusers_ours.EMAModel
CASES = {
    "torch swa": _averaged(),
    "torch swa, buffers": _averaged(use_buffers=True),
    "torch ema": _averaged(multi_avg_fn=torch_theirs.get_ema_multi_avg_fn(0.9)),
    "torch ema, one by one": _averaged(avg_fn=torch_theirs.get_ema_avg_fn(0.9)),
    "torch, a function": _averaged(avg_fn=lambda average, weight, n: average + (weight - average) / (2 + n) ** 0.5),
    "timm v3": _modules("ModelEmaV3"),
    "timm v3, warm-up": _modules("ModelEmaV3", use_warmup=True, update_after_step=3, min_decay=0.1),
    "timm v3, no buffers": _modules("ModelEmaV3", exclude_buffers=True),
    "timm v3, float64": _modules("ModelEmaV3", dtype=torch.float64),
    "timm v2": _modules("ModelEmaV2"),
    "timm v1": _modules("ModelEma"),
    "torch_ema": _listed(*TORCH_EMA, "update"),
    "torch_ema, constant": _listed(*TORCH_EMA, "update", use_num_updates=False),
    "diffusers": _listed(*DIFFUSERS, "step"),
    "diffusers, warm-up": _listed(*DIFFUSERS, "step", use_ema_warmup=True, update_after_step=4, min_decay=0.2),
    "ema-pytorch": _emas(),
    "ema-pytorch, every step": _emas(update_every=1, inv_gamma=2.0, min_value=0.3, ignore_names={"0.bias"}),
    "ema-pytorch, others": _emas(
        param_or_buffer_names_no_ema={"2.bias"}, include_online_model=False, ignore_startswith_names={"0."}
    ),
    "ema-pytorch, back": _emas(update_model_with_ema_every=7, update_model_with_ema_beta=0.5),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def trained(model, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        model(torch.randn(8, 4, generator=generator))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        yield step


def state_of(ema):
    return ema.ema.state_dict() if hasattr(ema, "ema") else ema.state_dict()


def values(ema):
    state = state_of(ema)
    shadow = state.get("shadow_params", [])
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {**tensors, **{str(i): value for i, value in enumerate(shadow)}}


def assert_same(first, second):
    ours, theirs = values(first), values(second)
    assert [*ours] == [*theirs]
    for name, value in theirs.items():
        if value.is_floating_point():  # of integers timm's V1 and V2 and torch make averages
            torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_after_many_steps_both_are_the_same(case):
    model = network()
    theirs, ours = case.both(model)
    if isinstance(theirs, ema_pytorch_theirs.EMA) and theirs.update_model_with_ema_every:
        other = copy.deepcopy(model)  # each pulls its model to itself
        theirs = case.make(case.classes[0], other)
        for step, _ in zip(trained(model, 40), trained(other, 40), strict=True):
            case.update(ours, model, step)
            case.update(theirs, other, step)
    else:
        for step in trained(model, STEPS):
            case.update(theirs, model, step)
            case.update(ours, model, step)
    assert [*state_of(ours)] == [*state_of(theirs)]
    assert_same(ours, theirs)


@pytest.mark.parity
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
@pytest.mark.parametrize(
    "name", sorted(CASES.keys() - {"timm v1", "ema-pytorch, back"})
)  # one resumes by a path, one trains
def test_each_goes_on_from_the_other_ones_file(name, direction):
    case, model = CASES[name], network()
    both = case.both(model)
    for step in trained(model, 12):
        for ema in both:
            case.update(ema, model, step)
    written, goes_on = both if direction == "theirs to ours" else both[::-1]
    file = io.BytesIO()
    torch.save(written.state_dict(), file)
    file.seek(0)
    fresh = case.make(type(goes_on), model)
    fresh.load_state_dict(torch.load(file))
    assert_same(fresh, written)
    for step in trained(model, 6, seed=1):
        case.update(fresh, model, 12 + step)
        case.update(written, model, 12 + step)
    assert_same(fresh, written)


@pytest.mark.parity
def test_timms_first_class_resumes_from_the_checkpoints_of_timm(tmp_path):
    model = network()
    torch.save({"state_dict_ema": {name: value + 1 for name, value in model.state_dict().items()}}, tmp_path / "c.pt")
    theirs, ours = (cls(model, resume=str(tmp_path / "c.pt")) for cls in (timm_theirs.ModelEma, timm_ours.ModelEma))
    assert_same(ours, theirs)
    assert ours.ema_has_module is theirs.ema_has_module is False


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_go_on_by_themselves(name):
    case, model = CASES[name], network()
    ours = case.make(case.classes[1], model)
    for step in trained(model, 6):
        case.update(ours, model, step)
    others = [copy.deepcopy(ours)]
    if not name.startswith(("torch_ema", "torch ema", "torch, ")):  # weak references and closures have no pickle there
        others.append(pickle.loads(pickle.dumps(ours)))
    before = {name: value.clone() for name, value in values(ours).items()}
    for other in others:
        assert_same(other, ours)
        own = getattr(other, "model", model) if isinstance(other, ema_pytorch_ours.EMA) else model
        for step in trained(own, 3, seed=2):
            case.update(other, own, 6 + step)
        assert any(not torch.equal(value, before[name]) for name, value in values(other).items())
    if not isinstance(ours, ema_pytorch_ours.EMA):
        assert all(torch.equal(value, before[name]) for name, value in values(ours).items())


@pytest.mark.parametrize("name", ["torch_ema", "diffusers", "ema-pytorch, every step"])
def test_tensors_that_are_replaced_on_either_side_are_followed(name):
    case, model = CASES[name], network()
    theirs, ours = case.both(model)
    for step in trained(model, 9):
        if step == 4:
            model[0].weight.data = model[0].weight.detach().clone() + 1
        if step == 6:
            for ema in (theirs, ours):
                if hasattr(ema, "shadow_params"):
                    ema.shadow_params = [tensor.clone() * 2 for tensor in ema.shadow_params]
                else:
                    ema.ema_model[2].weight.data = ema.ema_model[2].weight.detach().clone() * 2
        for ema in (theirs, ours):
            case.update(ema, model, step)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["timm v3", "torch swa"])
def test_the_module_is_the_average_whatever_is_done_to_it(name):
    case, model = CASES[name], network()
    ema = case.make(case.classes[1], model)
    case.update(ema, model, 1)
    ema.module.load_state_dict({n: torch.full_like(v, 4) for n, v in ema.module.state_dict().items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ema.double()
    case.update(ema, model, 1000)
    weight = ema.module[0].weight
    assert weight.dtype == torch.float64
    assert weight.unique().item() == pytest.approx(4 * 0.98 if name == "timm v3" else 2.0)


def test_a_frozen_parameter_is_copied_by_the_one_of_diffusers():
    model = network()
    model[2].weight.requires_grad_(requires_grad=False)
    theirs, ours = CASES["diffusers"].both(model)
    for step in trained(model, 5):
        for ema in (theirs, ours):
            CASES["diffusers"].update(ema, model, step)
    assert torch.equal(ours.shadow_params[4], model[2].weight)
    assert_same(ours, theirs)


def test_the_count_of_torchs_may_be_set_back():
    model = network()
    theirs, ours = CASES["torch swa"].both(model)
    for step in trained(model, 6):
        for ema in (theirs, ours):
            if step == 4:
                ema.n_averaged.fill_(0)
            ema.update_parameters(model)
    assert int(ours.n_averaged) == 3
    assert_same(ours, theirs)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name:FutureWarning")
def test_a_folder_of_diffusers_is_read_and_written(tmp_path):
    from diffusers import UNet2DModel

    def unet():
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )  # fmt: skip

    model = unet()
    for number, (writes, reads) in enumerate([DIFFUSERS, DIFFUSERS[::-1]]):
        ema = writes(model.parameters(), decay=0.95, model_cls=UNet2DModel, model_config=model.config)
        for _ in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            ema.step(model.parameters())
        ema.save_pretrained(tmp_path / str(number))
        read = reads.from_pretrained(tmp_path / str(number), UNet2DModel)
        assert read.optimization_step == 3
        assert read.decay == 0.95
        assert all(map(torch.equal, read.shadow_params, ema.shadow_params))


WRAPPERS = {"plain": lambda model: model, "compiled": torch.compile, "data parallel": nn.DataParallel}


@pytest.mark.parametrize("built", WRAPPERS)
@pytest.mark.parametrize("updated", WRAPPERS)
@pytest.mark.parametrize("name", ["timm v3", "timm v2", "timm v1", "torch swa"])
def test_wrappers_at_either_time_make_no_difference(name, built, updated):
    case, model = CASES[name], network()
    plain = case.make(case.classes[1], model)
    wrapped = case.make(case.classes[1], WRAPPERS[built](model))
    for step in trained(model, 3):
        case.update(plain, model, step)
        case.update(wrapped, WRAPPERS[updated](model), step)
    assert [*map(torch.Tensor.tolist, values(wrapped).values())] == [*map(torch.Tensor.tolist, values(plain).values())]
