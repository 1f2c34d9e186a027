"""Law 9: wrappers change no name and no number, and a user's own submodule called `module` is none."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import polyak
from models import Conv, Tied, average_bits, drifting, mlp, model_bits


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "bare": lambda model: model,
    "dp": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "compiled ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled dp of checkpoint": lambda model: compiled(nn.DataParallel(checkpoint_wrapper(model))),
}
pytestmark = pytest.mark.usefixtures("_process_group")


@pytest.mark.parametrize("build", [mlp, Conv, Tied], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    ("built", "updated"), [*itertools.product(WRAPPERS, ["bare", "ddp", "compiled dp of checkpoint"])]
)
def test_an_averager_built_on_one_wrapper_takes_updates_from_another(build, built, updated):
    torch.manual_seed(0)
    plain = build()
    reference = polyak.average(plain, "ema_v2", decay=0.7)
    torch.manual_seed(0)
    model = build()
    averager = polyak.average(WRAPPERS[built](model), "ema_v2", decay=0.7)
    wrapped = WRAPPERS[updated](model)
    for _ in drifting(plain, 3):
        reference.update()
    for _ in drifting(model, 3):
        averager.update(wrapped)
    assert average_bits(averager) == average_bits(reference)
    assert list(averager.averaged_state_dict()) == list(plain.state_dict())
    with averager.applied():
        assert model_bits(model).keys() == model_bits(plain).keys()
        assert all(model_bits(model)[name] == bits for name, bits in average_bits(averager).items())
    assert model_bits(model) == model_bits(plain)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_state_saved_from_a_wrapped_model_loads_without_the_wrapper(name):
    model = mlp()
    averager = polyak.average(WRAPPERS[name](model), "ema", decay=0.7)
    for _ in drifting(model, 2):
        averager.update()
    other = polyak.average(mlp(), "ema", decay=0.7)
    other.load_state_dict(averager.state_dict())
    assert average_bits(other) == average_bits(averager)


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper], ids=["compile", "checkpoint"])
def test_a_wrapper_around_a_part_of_the_model_changes_no_name(wrap):
    plain, model = mlp(), mlp()
    averager = polyak.average(plain, "ema", decay=0.7)
    model.load_state_dict(plain.state_dict())
    model[0] = wrap(model[0])
    assert list(polyak.average(model).averages) == list(averager.averages)
    for _ in drifting(model, 2):
        averager.update(model)
    assert averager.n == 2
    x = torch.ones(2, 3)
    within = polyak.average(model, "ema", decay=0.7)
    for _ in drifting(model, 1):
        within.update()
    expected = within(x)
    with within.applied(), torch.no_grad():
        assert torch.equal(model(x), expected)


BLOCKS = {
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "compile of checkpoint": lambda block: compiled(checkpoint_wrapper(block)),
    "checkpoint of compile": lambda block: checkpoint_wrapper(compiled(block)),
    "dp of compile": lambda block: nn.DataParallel(compiled(block)),
}


@pytest.mark.parametrize("within", [False, True], ids=["block", "blocks within"])
@pytest.mark.parametrize("wrap", BLOCKS.values(), ids=BLOCKS)
def test_what_is_saved_from_wrapped_blocks_loads_into_the_plain_model(wrap, within, tmp_path):
    def built():
        return nn.Sequential(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.ModuleDict({"module": nn.Linear(4, 2)})
        )

    plain, model = built(), built()
    averager = polyak.average(model, "ema", decay=0.5)
    if within:
        model[0][1] = wrap(model[0][1])
    model[0], model[1]["module"] = wrap(model[0]), wrap(model[1]["module"])
    with polyak.posthoc.Recorder(averager, tmp_path, every=1):
        for _ in drifting(model, 2):
            averager.update()
    saved = averager.averaged_state_dict()
    assert list(saved) == list(plain.state_dict())
    assert saved._metadata == plain.state_dict()._metadata  # the versions of its modules
    plain.load_state_dict(saved)
    assert average_bits(polyak.average(plain)) == average_bits(averager)
    made = polyak.posthoc.synthesize(tmp_path, "ema", decay=0.5).state_dict
    assert list(made) == list(saved)


@pytest.mark.parametrize("key", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_a_users_submodule_with_a_wrappers_name_is_left_alone(key):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(key, nn.Linear(2, 2))

        def forward(self, x):
            return self.get_submodule(key)(x)

    model = Mine()
    averager = polyak.average(nn.DataParallel(model), "ema", decay=0.5)
    assert list(averager.averages) == [f"{key}.weight", f"{key}.bias"]
    for _ in drifting(model, 1):
        averager.update()
    assert list(averager.averaged_state_dict()) == list(model.state_dict())
    assert averager(torch.ones(1, 2)).shape == (1, 2)


def test_a_model_compiled_in_place_is_averaged_and_applied():
    model = mlp()
    model.compile(backend="eager")
    averager = polyak.average(model, "ema", decay=0.5)
    x = torch.ones(1, 3)
    with torch.no_grad():
        model(x)
        for _ in drifting(model, 1):
            averager.update()
        with averager.applied():
            inside = model(x)
        assert torch.equal(inside, averager(x))
        assert not torch.equal(inside, model(x))


def test_ddp_trains_on_after_the_average_was_applied():
    model = mlp()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    averager = polyak.average(ddp, "ema", decay=0.5)
    before = model_bits(model)
    for _ in range(2):
        ddp(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update(ddp)
        with averager.applied(), torch.no_grad():
            ddp(torch.ones(2, 3))
    assert all(model_bits(model)[name] != before[name] for name in before)
