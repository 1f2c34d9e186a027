"""Engines of Ignite with an average: real steps, evaluators that see it, checkpoints that resume exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping
from ignite.metrics import Loss
from recorded import Record, bits, equal, near
from torch import nn

import polyak
from polyak.integrations.ignite import AveragingHandler

DECAY = 0.7


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


def batches(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(x, x.sum(1, keepdim=True)) for x in torch.randn(count, 8, 4, generator=generator)]


class Program:
    """A program with Ignite: every start makes it anew."""

    def __init__(self, strategy="ema", *, averaged=True, accumulate=1, dtype=torch.float32, model=None, **options):
        self.model = (model or network()).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.record = Record(self.model).follow(self.optimizer)
        self.seen = []

        def step(engine, batch):
            torch.manual_seed(engine.state.iteration)
            self.model.train()
            x, y = (part.to(dtype) for part in batch)
            nn.functional.mse_loss(self.model(x), y).backward()
            if engine.state.iteration % accumulate == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

        @torch.no_grad()
        def evaluate(engine, batch):
            self.model.eval()
            self.seen.append(bits(dict(self.model.named_parameters())))
            return self.model(batch[0].to(dtype)), batch[1].to(dtype)

        self.trainer, self.evaluator = Engine(step), Engine(evaluate)
        Loss(nn.functional.mse_loss).attach(self.evaluator, "loss")
        self.averaging = None
        if averaged:
            options = options or ({"decay": DECAY} if strategy == "ema" else {})
            self.averaging = AveragingHandler(self.model, strategy, **options)
            self.averaging.attach(self.trainer, self.optimizer)
            self.averaging.attach_evaluator(self.evaluator)

    @property
    def to_save(self):
        return {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer, "averaging": self.averaging}

    @property
    def averager(self):
        return self.averaging.averager

    def run(self, epochs=2):
        self.trainer.run(batches(), max_epochs=epochs)
        return self


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}, {"dtype": torch.bfloat16}], ids=str)
def test_n_counts_the_real_steps_and_the_average_is_the_reference(settings):
    program = Program(**settings).run()
    assert program.averager.n == len(program.record.steps) == (4 if "accumulate" in settings else 12)
    assert near(program.averager.averages, program.record.ema(DECAY))
    plain = Program(averaged=False, **settings).run()
    assert all(map(equal, program.record.steps, plain.record.steps))


def test_every_run_of_an_evaluator_sees_the_average_and_the_raw_weights_are_back():
    program, after = Program(), []

    @program.trainer.on(Events.STARTED | Events.EPOCH_COMPLETED)
    def _(engine):
        program.evaluator.run(batches(1, 2))
        after.append(bits(dict(program.model.named_parameters())))

    program.run()
    program.evaluator.run(batches(1, 2))
    record = program.record
    for step, weights in zip([0, 6, 12, 12], program.seen, strict=True):
        assert near(weights, record.ema(DECAY, steps=record.steps[:step]))
    assert all(map(equal, after, [record.start, record.steps[5], record.steps[11]]))
    assert equal(bits(dict(program.model.named_parameters())), record.steps[11])


@pytest.mark.parametrize("how", ["terminate", "interrupt", RuntimeError, KeyboardInterrupt])
def test_however_a_run_ends_the_raw_weights_are_back_and_errors_are_raised(how):
    program = Program().run()
    raw = bits(program.model)
    active = [True]

    @program.evaluator.on(Events.ITERATION_COMPLETED(once=1))
    def _(engine):
        if isinstance(how, str):
            getattr(engine, how)()
        elif active[0]:
            raise how(*["in the evaluation"])

    if isinstance(how, str):
        program.evaluator.run(batches(3, 2))
    else:
        with pytest.raises(how, match="in the evaluation"):
            program.evaluator.run(batches(3, 2))
    assert near(program.seen[-1], program.record.ema(DECAY))
    assert not program.averager.is_applied
    assert equal(bits(program.model), raw)
    active[0] = False
    program.evaluator.run(batches(3, 2))
    assert near(program.seen[-1], program.record.ema(DECAY))
    assert equal(bits(program.model), raw)


def test_a_handler_of_yours_may_still_swallow_an_exception():
    program, told = Program().run(), []

    @program.evaluator.on(Events.EXCEPTION_RAISED)
    def _(engine, error):
        told.append(error)

    @program.evaluator.on(Events.ITERATION_COMPLETED)
    def _(engine):
        raise RuntimeError(*["in the evaluation"])

    program.evaluator.run(batches(3, 2))
    assert len(told) == 1
    assert not program.averager.is_applied


WITHOUT = """
import sys
sys.modules["polyak"] = None
import torch
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
with torch.no_grad():
    losses = [nn.functional.mse_loss(model.eval()(x), y).item() for x, y in torch.load(sys.argv[2])]
print(sum(losses) / len(losses))
"""


@pytest.mark.parametrize("saved", ["averaged", "model"])
def test_the_best_checkpoint_has_its_recorded_metric_without_polyak(tmp_path, saved):
    program = Program()
    what = program.averaging.averaged if saved == "averaged" else program.model
    best = Checkpoint(
        {saved: what}, DiskSaver(tmp_path, require_empty=False), n_saved=1, score_name="score",
        score_function=lambda engine: -engine.state.metrics["loss"],
    )  # fmt: skip
    program.evaluator.add_event_handler(Events.COMPLETED, best)
    scores = []

    @program.trainer.on(Events.EPOCH_COMPLETED)
    def _(engine):
        scores.append(program.evaluator.run(batches(2, 2)).metrics["loss"])

    program.run(4)
    torch.save(batches(2, 2), tmp_path / "data.pt")
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / best.last_checkpoint), str(tmp_path / "data.pt")]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    assert float(told) == pytest.approx(min(scores), abs=1e-6)


@pytest.mark.parametrize("strategy", ["ema", "lawa"])
def test_a_resume_from_another_folder_goes_on_with_the_same_bits(tmp_path, strategy):
    program = Program(strategy)
    saver = Checkpoint(program.to_save, DiskSaver(tmp_path / "a", create_dir=True), n_saved=None)
    program.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=6), saver)
    program.run(3)
    (tmp_path / "a").rename(tmp_path / "b")
    (file,) = (tmp_path / "b").glob("*_6.pt")
    other = Program(strategy)
    Checkpoint.load_objects(other.to_save, torch.load(file, weights_only=True))
    assert other.averager.n == 6
    other.run(3)
    assert all(map(equal, other.record.steps, program.record.steps[6:]))
    assert equal(bits(other.averager.averages), bits(program.averager.averages))


def test_a_checkpoint_without_an_average_resumes_with_one_warning(tmp_path):
    plain = Program(averaged=False).run(1)
    state = {name: one.state_dict() for name, one in plain.to_save.items() if one is not None}
    program = Program()
    Checkpoint.load_objects({name: one for name, one in program.to_save.items() if name in state}, state)
    with pytest.warns(
        polyak.PolyakWarning, match=r"resumes at iteration 6, and no average was loaded; it begins anew"
    ) as told:
        program.run(2)
    assert len([one for one in told if one.category is polyak.PolyakWarning]) == 1
    assert program.averager.n == 6
    assert near(program.averager.averages, program.record.ema(DECAY, start=plain.record.steps[-1]))


def test_weights_that_are_loaded_before_the_run_are_the_start():
    program = Program()
    with torch.no_grad():
        program.model[0].weight.mul_(2)
    start = bits(dict(program.model.named_parameters()))
    program.run()
    assert near(program.averager.averages, program.record.ema(DECAY, start=start))


def test_early_stopping_follows_the_metric_of_the_average():
    program, scores = Program(), []
    stop = EarlyStopping(1, lambda engine: -engine.state.metrics["loss"], program.trainer)
    program.evaluator.add_event_handler(Events.COMPLETED, stop)
    program.optimizer.param_groups[0]["lr"] = 2.0

    @program.trainer.on(Events.EPOCH_COMPLETED)
    def _(engine):
        scores.append(program.evaluator.run(batches(2, 2)).metrics["loss"])

    program.run(30)
    assert len(scores) < 30
    assert -stop.best_score == min(scores)


def test_two_optimisers_make_one_update_per_step_of_both_and_two_averages_go_side_by_side():
    program = Program(averaged=False)
    parts = [torch.optim.SGD(part.parameters(), lr=0.05) for part in (program.model[0], program.model[3])]
    mean = AveragingHandler(program.model, "swa")
    mean.attach(program.trainer, parts)

    def step(engine, batch):
        nn.functional.mse_loss(program.model(batch[0]), batch[1]).backward()
        for optimizer in parts:
            optimizer.step()
            optimizer.zero_grad()

    ends = Record(program.model).follow(parts[1])
    trainer = Engine(step)
    short = AveragingHandler(program.model, "ema", decay=DECAY)
    short.attach(trainer, parts)
    trainer.run(batches())
    assert mean.averager.n == short.averager.n == 6
    assert near(mean.averager.averages, ends.swa())
    assert near(short.averager.averages, ends.ema(DECAY))


def test_a_config_file_is_taken_by_its_path_or_name(tmp_path):
    file = tmp_path / "average.yml"
    file.write_text("every: 2\nstrategy: {name: ema, decay: 0.5}\n", encoding="utf-8")
    for given in (file, str(file)):
        averager = AveragingHandler(network(), given).averager
        assert (averager.options.every, averager.strategy) == (2, polyak.EMA(decay=0.5))


def test_a_logger_gets_numbers_of_the_average_at_its_own_events():
    program, told = Program(), []
    program.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=4), lambda: told.append(program.averaging.metrics())
    )
    program.run()
    assert [one["polyak/n"] for one in told] == [4, 8, 12]
    assert all(one["polyak/distance"] > 0 for one in told)


# Bad input


def test_two_handlers_that_evaluate_are_refused():
    program = Program()
    with pytest.raises(polyak.ConfigError, match="this evaluator has an average already, and can see only one"):
        AveragingHandler(program.model, "swa").attach_evaluator(program.evaluator)


def test_a_handler_for_another_model_is_refused():
    program, other = Program(), Program(averaged=False)
    with pytest.raises(polyak.MismatchError, match="none of the optimiser's 6 tensors belongs to the averager's model"):
        program.averaging.attach(other.trainer, other.optimizer)


def test_saving_the_averager_inside_an_evaluation_is_refused(tmp_path):
    program = Program().run()
    saver = Checkpoint(program.to_save, DiskSaver(tmp_path, require_empty=False))
    program.evaluator.add_event_handler(Events.COMPLETED, saver)
    with pytest.raises(polyak.AppliedError, match=r"would save the average as the weights; attach the Checkpoint"):
        program.evaluator.run(batches(1, 2))
    assert not program.averager.is_applied


def test_what_is_no_engine_and_no_strategy_is_refused():
    program = Program()
    with pytest.raises(polyak.ArgumentError, match=r"attach\(\) got <Sequential> as a trainer; expected an ignite"):
        program.averaging.attach(program.model, program.optimizer)
    with pytest.raises(polyak.ArgumentError, match=r"attach_evaluator\(\) got <Sequential> as an evaluator"):
        program.averaging.attach_evaluator(program.model)
    with pytest.raises(polyak.UnknownStrategyError, match="no strategy is called 'emma'"):
        AveragingHandler(program.model, "emma")
    with torch.device("meta"):
        model = network()
    with pytest.raises(polyak.ModelError, match="meta"):
        AveragingHandler(model)


def test_a_state_of_another_strategy_another_model_or_damaged_is_refused():
    state = Program("swa").run(1).averaging.state_dict()
    with pytest.raises(polyak.StateError, match="strategy"):
        Program("ema").averaging.load_state_dict(state)
    with pytest.raises(polyak.StateError, match="belongs to another model"):
        Program("swa", model=nn.Linear(4, 1)).averaging.load_state_dict(state)
    del state["slots"]
    with pytest.raises(polyak.StateError, match="damaged or incomplete"):
        Program("swa").averaging.load_state_dict(state)
