"""A loop of Accelerate with an average: real steps, states that resume exactly, saving that never takes the average."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from launch import torchrun
from recorded import Record, bits, equal, near
from torch import nn

import polyak
from polyak.integrations.accelerate import average, save_average

DECAY = 0.7


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


class Loop:
    """A program with Accelerate: every start makes it anew."""

    def __init__(self, strategy="ema", *, averaged=True, accumulate=1, precision="no", model=None, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
        self.raw = model or network()
        inner = torch.optim.AdamW(self.raw.parameters(), lr=0.05)
        self.record = Record(self.raw).follow(inner)
        self.model, self.optimizer = self.accelerator.prepare(self.raw, inner)
        options = options or ({"decay": DECAY} if strategy == "ema" else {})
        self.averager = average(self.accelerator, self.model, self.optimizer, strategy, **options) if averaged else None

    def train(self, batches):
        for batch in batches:
            torch.manual_seed(batch)
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(torch.randn(8, 4)).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}, {"precision": "bf16"}], ids=str)
def test_n_counts_the_real_steps_and_the_average_is_the_reference(settings):
    loop = Loop(**settings).train(range(9))
    assert loop.averager.n == len(loop.record.steps) == (3 if "accumulate" in settings else 9)
    assert near(loop.averager.averages, loop.record.ema(DECAY))
    plain = Loop(averaged=False, **settings).train(range(9))
    assert all(map(equal, loop.record.steps, plain.record.steps))


def test_evaluations_in_applied_see_the_average_and_errors_leave_the_raw_weights():
    loop = Loop().train(range(3))
    raw = bits(loop.raw)
    with loop.averager.applied():
        assert near(bits(dict(loop.raw.named_parameters())), loop.record.ema(DECAY))
    with pytest.raises(KeyboardInterrupt), loop.averager.applied():
        raise KeyboardInterrupt
    assert equal(bits(loop.raw), raw)
    assert not loop.averager.is_applied


@pytest.mark.parametrize("strategy", ["ema", "swa", "lawa"])
def test_a_resume_from_another_folder_goes_on_with_the_same_bits(tmp_path, strategy):
    loop = Loop(strategy).train(range(4))
    loop.accelerator.save_state(tmp_path / "a")
    loop.train(range(4, 8))
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "polyak" / "averager.pt").is_file()
    other = Loop(strategy)
    other.accelerator.load_state(tmp_path / "b")
    assert other.averager.n == 4
    other.train(range(4, 8))
    assert equal(bits(other.raw), bits(loop.raw))
    assert equal(bits(other.averager.averages), bits(loop.averager.averages))


def test_checkpoints_that_name_themselves_are_saved_and_loaded(tmp_path):
    from accelerate.utils import ProjectConfiguration

    loop = Loop().train(range(2))
    for one in (loop, other := Loop()):
        one.accelerator.project_configuration.automatic_checkpoint_naming = True
        one.accelerator.project_configuration.set_directories(str(tmp_path))
    assert isinstance(loop.accelerator.project_configuration, ProjectConfiguration)
    loop.accelerator.save_state()
    other.accelerator.load_state()
    assert other.averager.n == 2


def test_two_averages_of_one_accelerator_are_both_resumed(tmp_path):
    def two():
        loop = Loop()
        return loop, average(loop.accelerator, loop.model, loop.optimizer, "swa")

    loop, mean = two()
    loop.train(range(3))
    assert near(mean.averages, loop.record.swa())
    loop.accelerator.save_state(tmp_path)
    other, again = two()
    other.accelerator.load_state(tmp_path)
    assert equal(bits(again.averages), bits(mean.averages))
    assert equal(bits(other.averager.averages), bits(loop.averager.averages))


def test_a_checkpoint_without_an_average_loads_with_one_warning_and_the_average_begins_from_its_weights(tmp_path):
    plain = Loop(averaged=False).train(range(3))
    plain.accelerator.save_state(tmp_path)
    loop = Loop().train(range(9, 11))
    loop.record.steps.clear()
    with pytest.warns(polyak.PolyakWarning, match="holds no average; the average begins anew") as told:
        loop.accelerator.load_state(tmp_path)
    assert len([one for one in told if one.category is polyak.PolyakWarning]) == 1
    assert loop.averager.n == 0
    assert equal(bits(loop.raw), bits(plain.raw))
    with loop.averager.applied():
        assert equal(bits(loop.raw), bits(plain.raw))
    loop.train(range(3, 6))
    assert near(loop.averager.averages, loop.record.ema(DECAY, start=dict(plain.raw.named_parameters())))
    loop.accelerator.save_state(tmp_path)
    loop.accelerator.load_state(tmp_path)
    assert loop.averager.n == 3


def test_save_state_inside_applied_is_refused_and_writes_no_model(tmp_path):
    loop = Loop().train(range(3))
    with (
        pytest.raises(polyak.AppliedError, match=r"save_state\(\) while the model holds the average.*leave applied"),
        loop.averager.applied(),
    ):
        loop.accelerator.save_state(tmp_path)
    assert [*tmp_path.rglob("*.safetensors")] == []
    loop.accelerator.save_state(tmp_path)
    from safetensors.torch import load_file

    assert equal(load_file(tmp_path / "model.safetensors"), bits(loop.raw))


WITHOUT = """
import sys
sys.modules["polyak"] = None
import torch
from safetensors.torch import load_file
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
model.load_state_dict(load_file(sys.argv[1]))
print(repr(model.eval()(torch.ones(2, 4)).sum().item()))
"""


def test_the_averaged_model_is_saved_for_a_place_without_polyak(tmp_path):
    loop = Loop().train(range(4))
    raw = bits(loop.raw)
    save_average(loop.accelerator, loop.averager, loop.model, tmp_path)
    assert equal(bits(loop.raw), raw)
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "model.safetensors")]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    with torch.no_grad():
        assert float(told) == loop.averager(torch.ones(2, 4)).sum().item()


def test_a_model_of_transformers_is_saved_as_such(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    loop = Loop(model=GPT2LMHeadModel(config))
    ids = torch.arange(8).unsqueeze(0)
    for _ in range(3):
        loop.accelerator.backward(loop.model(ids, labels=ids).loss)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    save_average(loop.accelerator, loop.averager, loop.model, tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    parameters = bits(dict(loaded.named_parameters()))
    assert equal(parameters, {name: loop.averager.averages[name] for name in parameters})


def test_several_optimisers_make_one_update_together():
    accelerator, model = Accelerator(cpu=True), network()
    inner = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[3])]
    model, *optimizers = accelerator.prepare(model, *inner)
    averager = average(accelerator, model, optimizers, decay=DECAY)
    for _ in range(3):
        accelerator.backward(model(torch.randn(8, 4)).square().mean())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert averager.n == 3


def test_a_compiled_model_is_averaged_under_its_own_names():
    accelerator, model = Accelerator(cpu=True), network()
    model, optimizer = accelerator.prepare(
        torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    averager = average(accelerator, model, optimizer)
    assert {*averager.averages} == {*network().state_dict()}


def test_a_config_file_is_taken_by_its_path_or_name(tmp_path):
    file = tmp_path / "average.yaml"
    file.write_text("every: 2\nstrategy: {name: ema, decay: 0.5}\n", encoding="utf-8")
    for given in (file, str(file)):
        loop = Loop(given, start=0).train(range(6))
        assert (loop.averager.n, loop.averager.strategy) == (3, polyak.EMA(decay=0.5))


def test_two_ranks_average_in_sync_and_resume_exactly(tmp_path):
    torchrun("accelerate_ddp.py", tmp_path)


# Bad input


def test_an_optimiser_that_is_not_prepared_is_refused():
    accelerator, model = Accelerator(cpu=True), network()
    with pytest.raises(
        polyak.ConfigError, match=r"got <SGD> as the optimiser.*accelerator\.prepare\(model, optimizer\)"
    ):
        average(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_swapped_arguments_are_asked_about():
    loop = Loop()
    with pytest.raises(
        polyak.ArgumentError, match=r"as the accelerator; expected average\(accelerator, model, optimizer\)"
    ):
        average(loop.model, loop.accelerator, loop.optimizer)
    with pytest.raises(polyak.ArgumentError, match=r"save_average\(\) got .* are the arguments swapped"):
        save_average(loop.accelerator, loop.model, loop.averager, "folder")


def test_an_unknown_strategy_is_named():
    with pytest.raises(polyak.UnknownStrategyError, match="no strategy is called 'emma'"):
        Loop("emma", decay=0.5)


def test_an_optimiser_of_another_model_is_refused():
    loop, other = Loop(averaged=False), Loop(averaged=False)
    with pytest.raises(polyak.MismatchError, match="none of the optimiser's 6 tensors belongs to the averager's model"):
        average(loop.accelerator, loop.model, other.optimizer)


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = network()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(polyak.ModelError, match="meta"):
        average(accelerator, model, optimizer)


def test_a_checkpoint_of_another_strategy_another_model_or_damaged_is_refused(tmp_path):
    Loop("swa").train(range(2)).accelerator.save_state(tmp_path)
    with pytest.raises(polyak.StateError, match="strategy"):
        Loop("ema").accelerator.load_state(tmp_path)
    model = network()
    model.append(nn.Linear(1, 1))
    other = Loop("swa", model=model)
    before = bits(other.raw)
    with pytest.raises(polyak.StateError, match=r"belongs to another model.*\n.*missing: 4\.bias"):
        other.accelerator.load_state(tmp_path)
    assert equal(bits(other.raw), before)
    file = tmp_path / "polyak" / "averager.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(polyak.StateError, match=r"averager\.pt' is damaged or incomplete"):
        Loop("swa").accelerator.load_state(tmp_path)
