"""Lightning's Trainer with an average: what validation sees, checkpoints hold and a resume restores."""

from __future__ import annotations

import csv
import inspect
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from launch import torchrun
from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.cli import LightningCLI
from recorded import Record, bits, equal, near
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak
from polyak.integrations.lightning import AveragingCallback

DECAY = 0.7
OWN = getattr(callbacks, "EMAWeightAveraging", None)  # Lightning's own, since 2.6
NEEDS_OWN = pytest.mark.skipif(OWN is None, reason="this Lightning averages nothing itself")
# The compiler of torch 2.6 stumbles over Lightning's own attributes.
COMPILES = pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="does not compile a LightningModule")
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


class Tiny(LightningModule):
    """A model with dropout and batch norm: random numbers and buffers count, too."""

    def __init__(self, lr=0.05):
        super().__init__()
        self.net, self.lr = network(), lr
        self.validated, self.tested, self.record = [], [], None

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append(self.now())
        self.log("val", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.tested.append(self.now())
        self.log("test", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def now(self):
        return bits(dict(self.named_parameters()))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        self.record = Record(self).follow(optimizer)
        return optimizer


class Stateful(DataLoader):
    """A loader whose place within an epoch Lightning saves: only then is a resume in the middle exact."""

    place = 0

    def __iter__(self):
        begin, self.place = self.place, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= begin:
                self.place = (number + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def loader(count=24, seed=1, batch=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return Stateful(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch)


def trainer_of(folder, *callbacks, **settings):
    defaults = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": str(folder), "enable_checkpointing": False,
    }  # fmt: skip
    if any(isinstance(one, Checkpoint) for one in callbacks):
        defaults["enable_checkpointing"] = True
    return Trainer(callbacks=[*callbacks], **{**defaults, **settings})


def fitted(folder, *callbacks, model=None, averaged=True, averaging=None, ckpt_path=None, load=None, **settings):
    torch.manual_seed(0)
    model = model or Tiny()
    averaging = averaging or (AveragingCallback("ema", decay=DECAY) if averaged else None)
    trainer = trainer_of(folder, *([averaging] if averaged else []), *callbacks, **settings)
    torch.manual_seed(1)
    trainer.fit(model, loader(), loader(8, 2), ckpt_path=ckpt_path, **(load or {}))
    return model, averaging, trainer


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str
)
def test_n_counts_the_real_steps_and_the_average_is_the_reference(tmp_path, settings):
    model, averaging, trainer = fitted(tmp_path, **settings)
    assert (
        averaging.averager.n
        == len(model.record.steps)
        == trainer.global_step
        == (4 if "accumulate_grad_batches" in settings else 12)
    )
    assert near(averaging.averager.averages, model.record.ema(DECAY))


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"val_check_interval": 2}], ids=str)
def test_the_weights_of_every_step_are_those_of_a_run_without_it(tmp_path, settings):
    ours, _, _ = fitted(tmp_path, **settings)
    plain, _, _ = fitted(tmp_path, averaged=False, **settings)
    assert len(ours.record.steps) == len(plain.record.steps)
    assert all(map(equal, ours.record.steps, plain.record.steps))


def test_validation_sees_the_average_and_the_raw_weights_are_back(tmp_path):
    class Watch(Callback):
        after: ClassVar = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.after.append(pl_module.now())

    torch.manual_seed(0)
    model, averaging = Tiny(), AveragingCallback("ema", decay=DECAY)
    trainer = trainer_of(tmp_path, averaging, Watch(), val_check_interval=3)
    trainer.fit(model, loader(), [loader(4, 2), loader(4, 3)])
    record = model.record
    at = [0, 0, 3, 3, 6, 6, 9, 9, 12, 12]  # the sanity check first; two data sets each time
    assert len(model.validated) == len(at)
    for step, weights in zip(at, model.validated, strict=True):
        assert near(weights, record.ema(DECAY, steps=record.steps[:step]))
    assert all(map(equal, Watch.after, [record.start, *record.steps[:-1]]))


@pytest.mark.parametrize("at_end", ["average", "raw"])
def test_after_the_fit_test_and_predict_see_what_was_asked_for(tmp_path, at_end):
    averaging = AveragingCallback("ema", decay=DECAY, at_end=at_end)
    model, _, trainer = fitted(tmp_path, averaging=averaging)
    expected = (
        model.record.ema(DECAY) if at_end == "average" else {n: t.double() for n, t in model.record.steps[-1].items()}
    )
    trainer.test(model, loader(8, 2), verbose=False)
    assert near(model.tested[-1], expected)
    trainer.validate(model, loader(8, 2), verbose=False)
    assert near(model.validated[-1], expected)
    (predicted,) = trainer.predict(model, loader(4, 2))
    with torch.no_grad():
        assert torch.equal(predicted, model.eval().net(next(iter(loader(4, 2)))[0]))
    assert not averaging.averager.is_applied


WITHOUT = """
import sys
sys.modules["polyak"] = None
import torch
from lightning.pytorch import Trainer
sys.path.insert(0, sys.argv[3])
import plain
model = plain.Plain.load_from_checkpoint(sys.argv[1], weights_only=True)
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
batches = torch.utils.data.DataLoader(torch.load(sys.argv[2], weights_only=False), batch_size=4)
(told,) = trainer.validate(model, batches, verbose=False)
print("val", repr(told["val"]))
"""

PLAIN = """
from torch import nn
from lightning.pytorch import LightningModule
class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val", nn.functional.mse_loss(self.net(x), y))
"""


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_best_checkpoint_has_its_recorded_metric_without_polyak(tmp_path, weights_only):
    best = ModelCheckpoint(tmp_path, monitor="val", save_top_k=1, save_weights_only=weights_only)
    model, _, trainer = fitted(tmp_path, best, max_epochs=3)
    (tmp_path / "plain.py").write_text(PLAIN, encoding="utf-8")
    torch.save(loader(8, 2).dataset, tmp_path / "data.pt")
    command = [sys.executable, "-c", WITHOUT, best.best_model_path, str(tmp_path / "data.pt"), str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout
    assert float(told.split("val ")[1]) == float(best.best_model_score)
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    steps = model.record.steps[: checkpoint["global_step"]]
    assert near(checkpoint["state_dict"], model.record.ema(DECAY, steps=steps))
    assert ("current_model_state" in checkpoint) is not weights_only
    if not weights_only:
        assert equal({n: checkpoint["current_model_state"][n] for n in steps[-1]}, steps[-1])
    assert trainer.validate(model, loader(8, 2), ckpt_path=best.best_model_path, verbose=False)[0]["val"] == float(
        best.best_model_score
    )


class Seeds(Callback):
    """Makes dropout depend on the step alone, so that it goes on where it was."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("strategy", [{"name": "ema", "decay": DECAY}, {"name": "lawa", "window": 3}])
def test_a_resume_in_the_middle_of_an_epoch_from_another_folder_goes_on_with_the_same_bits(tmp_path, strategy):
    def made():
        return AveragingCallback(strategy, every=2)

    saves = ModelCheckpoint(tmp_path / "a", every_n_train_steps=8, save_top_k=-1, filename="{step}")
    model, whole, _ = fitted(tmp_path, saves, Seeds(), averaging=made(), max_epochs=3)
    (tmp_path / "a").rename(tmp_path / "b")
    file = tmp_path / "b" / "step=8.ckpt"
    assert torch.load(file, weights_only=True)["global_step"] == 8
    again, resumed, _ = fitted(
        tmp_path / "c", Seeds(), averaging=made(), max_epochs=3, ckpt_path=file, load=WEIGHTS_ONLY
    )
    assert all(map(equal, again.record.steps, model.record.steps[8:]))
    assert len(again.record.steps) == 10
    assert resumed.averager.n == whole.averager.n == 9
    assert equal(bits(resumed.averager.averages), bits(whole.averager.averages))
    assert resumed.averager.profile().shares.tolist() == whole.averager.profile().shares.tolist()


def test_a_checkpoint_holds_each_tensor_of_the_average_once(tmp_path):
    saves = ModelCheckpoint(tmp_path / "a", save_last=True)
    fitted(tmp_path, saves)
    found = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    slots = found["callbacks"]["AveragingCallback"]["slots"]["average"]
    assert slots["net.0.weight"].data_ptr() == found["state_dict"]["net.0.weight"].data_ptr()
    assert slots["net.0.weight"].data_ptr() != found["current_model_state"]["net.0.weight"].data_ptr()


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_without_an_average_resumes_with_one_warning(tmp_path, weights_only):
    saves = ModelCheckpoint(
        tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}", save_weights_only=weights_only
    )
    plain, _, _ = fitted(tmp_path, saves, averaged=False, max_epochs=1)
    file = tmp_path / "step=6.ckpt"
    if weights_only:
        with pytest.raises(KeyError, match="contains only the model"):
            fitted(tmp_path, ckpt_path=file)
        return
    with pytest.warns(polyak.PolyakWarning, match="holds no average; the average begins anew") as told:
        model, averaging, _ = fitted(tmp_path, ckpt_path=file, max_epochs=2)
    assert len([one for one in told if one.category is polyak.PolyakWarning]) == 1
    assert averaging.averager.n == len(model.record.steps) == 6
    assert near(averaging.averager.averages, model.record.ema(DECAY, start=plain.record.steps[5]))


@NEEDS_OWN
@pytest.mark.parametrize("strategy", [{"name": "ema", "decay": DECAY}, "swa"], ids=["ema", "swa"])
def test_a_checkpoint_of_lightnings_own_average_goes_on_from_it(tmp_path, strategy):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    torch.manual_seed(0)
    model = Tiny()
    trainer = trainer_of(tmp_path, OWN(decay=DECAY), saves, max_epochs=1)
    trainer.fit(model, loader(), loader(8, 2))
    found = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    with pytest.warns(polyak.PolyakWarning, match=r"an average of Lightning's own \(6 updates\); it goes on"):
        again, averaging, _ = fitted(
            tmp_path, averaging=AveragingCallback(strategy), ckpt_path=tmp_path / "step=6.ckpt", max_epochs=2
        )
    assert equal(
        again.record.steps[0].keys() and {n: found["current_model_state"][n] for n in model.now()},
        model.record.steps[5],
    )
    assert averaging.averager.n == 12
    average = {name: found["state_dict"][name].double() for name in model.now()}
    for count, weights in enumerate(again.record.steps, 7):
        rate = 1 / count if strategy == "swa" else 1 - DECAY
        for name, tensor in average.items():
            tensor.add_(rate * (weights[name].double() - tensor))
    assert near(averaging.averager.averages, average)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_validation_leaves_the_raw_weights_and_a_right_checkpoint(tmp_path, error):
    class Broken(Callback):
        active = True

        def on_validation_batch_start(self, trainer, *args):
            if self.active and not trainer.sanity_checking:
                raise error(*["in the validation"])

    torch.manual_seed(0)
    model, averaging = Tiny(), AveragingCallback("ema", decay=DECAY)
    trainer = trainer_of(
        tmp_path, broken := Broken(), averaging, OnExceptionCheckpoint(tmp_path, filename="error"), val_check_interval=4
    )
    with pytest.raises((error, SystemExit)):
        trainer.fit(model, loader(), loader(8, 2))
    assert not averaging.averager.is_applied
    assert equal(model.now(), model.record.steps[3])
    found = torch.load(tmp_path / "error.ckpt", weights_only=True)
    assert near(found["state_dict"], model.record.ema(DECAY))
    assert equal({name: found["current_model_state"][name] for name in model.now()}, model.record.steps[3])
    # The trainer and the model can be used again.
    broken.active = False
    again = trainer_of(tmp_path, averaging, val_check_interval=4)
    again.fit(model, loader(), loader(8, 2), ckpt_path=tmp_path / "error.ckpt")
    assert averaging.averager.n == 12
    trainer.test(model, loader(8, 2), verbose=False)
    assert near(model.tested[-1], {name: model.now()[name].double() for name in model.now()})


def test_early_stopping_and_plateau_follow_the_average(tmp_path):
    class Plateau(Tiny):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "monitor": "val"}}

    class Told(Callback):
        values: ClassVar = []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.values.append(float(trainer.callback_metrics["val"]))

    stop = EarlyStopping("val", patience=1)
    model, averaging, _ = fitted(tmp_path, Told(), stop, model=Plateau(lr=2.0), max_epochs=20)
    assert averaging.averager.n == 6 * len(Told.values) < 120
    assert float(stop.best_score) == min(Told.values)
    assert model.scheduler.best == min(Told.values)


class Manual(Tiny):
    """Two optimisers, one update per batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.ends = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        # In one batch only the first steps, in another none.
        for optimizer in (first, second)[: {1: 1, 2: 0}.get(batch_idx, 2)]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx != 2:
            self.ends.append(self.now())

    def configure_optimizers(self):
        self.record = Record(self)
        return [torch.optim.SGD(part.parameters(), lr=0.02) for part in (self.net[0], self.net[1:])]


def test_two_optimisers_make_one_update_per_batch(tmp_path):
    model, averaging, trainer = fitted(tmp_path, model=Manual())
    assert trainer.global_step == 18
    assert averaging.averager.n == 10
    assert near(averaging.averager.averages, model.record.ema(DECAY, steps=model.ends))


def test_two_averages_side_by_side_are_both_resumed(tmp_path):
    def two():
        return AveragingCallback("ema", decay=DECAY, name="short"), AveragingCallback(
            "swa", name="mean", evaluate=False
        )

    def fit(folder, ema, mean, *callbacks, **settings):
        torch.manual_seed(0)
        model = Tiny()
        trainer_of(folder, ema, mean, *callbacks, Seeds(), max_epochs=2).fit(model, loader(), loader(8, 2), **settings)
        return model

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    model = fit(tmp_path, *(first := two()), saves)
    assert near(first[1].averager.averages, model.record.swa())
    fit(tmp_path, *(second := two()), ckpt_path=tmp_path / "step=6.ckpt")
    for one, other in zip(first, second, strict=True):
        assert one.averager.n == other.averager.n == 12
        assert equal(bits(one.averager.averages), bits(other.averager.averages))
    alone = AveragingCallback("swa", name="mean", evaluate=False)
    saves = ModelCheckpoint(tmp_path / "alone", save_last=True)
    model, _, _ = fitted(tmp_path, saves, averaging=alone)
    found = torch.load(tmp_path / "alone" / "last.ckpt", weights_only=True)
    assert "current_model_state" not in found
    assert equal({n: found["state_dict"][n] for n in model.now()}, model.record.steps[-1])
    assert equal(model.now(), model.record.steps[-1])


def test_layers_that_configure_model_makes_are_averaged(tmp_path):
    class Late(Tiny):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(0)
                self.net = network()

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    model, averaging, _ = fitted(tmp_path, saves, Seeds(), model=Late())
    assert near(averaging.averager.averages, model.record.ema(DECAY))
    _, resumed, _ = fitted(tmp_path, Seeds(), model=Late(), ckpt_path=tmp_path / "step=6.ckpt")
    assert equal(bits(resumed.averager.averages), bits(averaging.averager.averages))


@pytest.mark.parametrize("how", ["a part", pytest.param("the module", marks=COMPILES)])
def test_compiled_modules_are_averaged_saved_and_resumed(tmp_path, how):
    def made():
        torch.manual_seed(0)
        model = Tiny()
        if how == "a part":
            model.net = torch.compile(model.net, backend="eager")
            return model
        return torch.compile(model, backend="eager")

    def fit(callback, *callbacks, **settings):
        model = made()
        trainer_of(tmp_path, callback, *callbacks, Seeds()).fit(model, loader(), loader(8, 2), **settings)
        return model

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    whole, resumed = AveragingCallback("ema", decay=DECAY), AveragingCallback("ema", decay=DECAY)
    fit(whole, saves)
    assert {*whole.averager.averages} == {f"net.{name}" for name in network().state_dict()}
    fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert equal(bits(resumed.averager.averages), bits(whole.averager.averages))


def test_validate_without_fit_sees_the_weights_as_they_are(tmp_path):
    model, averaging = Tiny(), AveragingCallback("ema")
    before = model.now()
    trainer_of(tmp_path, averaging).validate(model, loader(8, 2), verbose=False)
    assert averaging.averager is None
    assert equal(model.validated[0], before)


def test_loggers_get_numbers_of_the_average_at_their_own_steps(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    averaging = AveragingCallback("ema", decay=DECAY, log=True)
    model, _, _ = fitted(tmp_path, averaging=averaging, logger=CSVLogger(tmp_path), log_every_n_steps=4)
    (file,) = tmp_path.rglob("metrics.csv")
    told = [row for row in csv.DictReader(file.open()) if row["polyak/n"]]
    assert [float(row["polyak/n"]) for row in told] == [4, 8, 12]
    average = model.record.ema(DECAY, steps=model.record.steps[:8])
    apart = [(model.record.steps[7][name].double() - average[name]).square().sum() for name in average]
    assert float(told[1]["polyak/distance"]) == pytest.approx(float(sum(apart)) ** 0.5, rel=1e-5)
    assert {*told[0]} >= {f"polyak/{name}" for name in ("rate", "half_life", "skipped", "held")}


def test_a_second_fit_begins_anew_and_leaves_no_hooks(tmp_path):
    model, averaging, trainer = fitted(tmp_path)
    first = averaging.averager
    (optimizer,) = trainer.optimizers
    assert not [hook for hook in optimizer._optimizer_step_post_hooks.values() if "polyak" in type(hook).__module__]
    trainer = trainer_of(tmp_path, averaging, max_epochs=1)
    trainer.fit(model, loader(), loader(8, 2))
    assert averaging.averager is not first
    assert (averaging.averager.n, first.n) == (6, 12)


def test_a_checkpoint_within_a_validation_and_by_hand_holds_both(tmp_path):
    class Saves(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "within.ckpt")
                assert near(pl_module.now(), pl_module.record.ema(DECAY))

    model, _, _ = fitted(tmp_path, Saves())
    found = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert near(found["state_dict"], model.record.ema(DECAY))
    assert equal({n: found["current_model_state"][n] for n in model.now()}, model.record.steps[-1])


@pytest.mark.parametrize("at_end", ["average", "raw"])
def test_a_checkpoint_by_hand_after_the_fit_holds_the_average(tmp_path, at_end):
    averaging = AveragingCallback("ema", decay=DECAY, at_end=at_end)
    model, _, trainer = fitted(tmp_path, averaging=averaging)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    found = torch.load(tmp_path / "after.ckpt", weights_only=True)
    average = model.record.ema(DECAY)
    assert near(found["state_dict"], average)
    assert near(found["callbacks"]["AveragingCallback"]["slots"]["average"], average)
    assert ("current_model_state" in found) is (at_end == "raw")
    if at_end == "raw":
        assert equal({n: found["current_model_state"][n] for n in model.now()}, model.record.steps[-1])


def test_the_search_for_a_learning_rate_leaves_no_trace(tmp_path):
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    model, averaging, trainer = fitted(tmp_path, finder)
    steps = model.record.steps[5:]
    assert averaging.averager.n == trainer.global_step == len(steps)
    assert near(averaging.averager.averages, model.record.ema(DECAY, steps=steps))


def test_a_config_file_is_taken_by_its_path_or_name(tmp_path):
    file = tmp_path / "average.json"
    file.write_text('{"every": 2, "strategy": {"name": "ema", "decay": 0.5}}', encoding="utf-8")
    for given in (file, str(file)):
        _, averaging, _ = fitted(tmp_path, averaging=AveragingCallback(given))
        assert (averaging.averager.n, averaging.averager.strategy) == (6, polyak.EMA(decay=0.5))


def test_a_command_line_carries_the_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "average.toml").write_text('every = 2\nstrategy = { name = "ema", decay = 0.5 }\n', encoding="utf-8")
    callback = "class_path: polyak.integrations.lightning.AveragingCallback"
    options = "accelerator: cpu, logger: false, enable_progress_bar: false, max_steps: 6"
    for strategy in ("average.toml", "{name: ema, decay: 0.5}"):
        every = "" if strategy.endswith("toml") else ", dict_kwargs: {every: 2}"
        (tmp_path / "config.yaml").write_text(
            f"trainer: {{{options}, callbacks: [{{{callback}, init_args: {{strategy: {strategy}}}{every}}}]}}\n",
            encoding="utf-8",
        )
        cli = LightningCLI(Tiny, save_config_callback=None, run=False, args=["--config=config.yaml"])
        cli.trainer.fit(cli.model, loader(), loader(8, 2))
        (averaging,) = [one for one in cli.trainer.callbacks if isinstance(one, AveragingCallback)]
        assert (averaging.averager.n, averaging.averager.strategy) == (3, polyak.EMA(decay=0.5))


@pytest.mark.slow
def test_two_ranks_average_in_sync_and_resume_exactly(tmp_path):
    torchrun("lightning_ddp.py", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 trains on no CPU")
@pytest.mark.parametrize("kind", ["full", "distributed"])
def test_shards_are_saved_whole_and_resumed_exactly_also_on_one_rank(tmp_path, kind):
    torchrun("lightning_fsdp2.py", tmp_path, kind, 2)
    torchrun("lightning_fsdp2.py", tmp_path, kind, 1, ranks=1)


# Bad input


def test_a_model_on_meta_is_refused(tmp_path):
    with torch.device("meta"):
        model = Tiny()
    model.to = model.cpu = lambda *args, **kwargs: model  # torch itself refuses to move it
    with pytest.raises(polyak.ModelError, match="meta"):
        fitted(tmp_path, model=model)


def test_an_unknown_strategy_and_setting_are_named_before_training_starts():
    with pytest.raises(polyak.UnknownStrategyError, match="no strategy is called 'emma'"):
        AveragingCallback("emma")
    with pytest.raises(polyak.ConfigError, match=r"AveragingCallback\(\): the settings[\s\S]*Did you mean 'decay'"):
        AveragingCallback("ema", decoy=0.5)
    with pytest.raises(polyak.ConfigError, match="at_end='best' is unknown; expected 'average' or 'raw'"):
        AveragingCallback(at_end="best")


@pytest.mark.parametrize("other", [lambda: AveragingCallback("swa", name="other"), pytest.param(OWN, marks=NEEDS_OWN)])
def test_two_callbacks_that_evaluate_are_refused(tmp_path, other):
    with pytest.raises(polyak.ConfigError, match=r"would both put an average into the model.*evaluate=False"):
        fitted(tmp_path, other())


def test_a_callback_for_another_model_is_refused(tmp_path):
    _, averaging, _ = fitted(tmp_path)
    with pytest.raises(polyak.ConfigError, match="has averaged another Tiny; make a new callback for each model"):
        fitted(tmp_path, averaging=averaging)


def test_a_checkpoint_of_another_strategy_or_model_is_refused(tmp_path):
    fitted(tmp_path, ModelCheckpoint(tmp_path, filename="one"))
    with pytest.raises(polyak.StateError, match="strategy"):
        fitted(tmp_path, averaging=AveragingCallback("swa"), ckpt_path=tmp_path / "one.ckpt")
    other = Tiny()
    other.more, other.strict_loading = nn.Parameter(torch.zeros(2)), False
    with pytest.raises(polyak.StateError, match=r"belongs to another model[\s\S]*missing: more"):
        fitted(tmp_path, model=other, ckpt_path=tmp_path / "one.ckpt")
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del found["callbacks"]["AveragingCallback"]["progress"]
    torch.save(found, tmp_path / "damaged.ckpt")
    with pytest.raises(polyak.StateError, match="damaged or incomplete"):
        fitted(tmp_path, ckpt_path=tmp_path / "damaged.ckpt")


def test_saving_inside_applied_is_refused(tmp_path):
    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            with averaging.averager.applied():
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    averaging = AveragingCallback("ema")
    with pytest.raises(polyak.AppliedError, match=r"inside applied\(\) would save the average as the raw weights"):
        fitted(tmp_path, Saves(), averaging=averaging)
    assert not (tmp_path / "x.ckpt").exists()


def test_an_optimiser_of_another_model_is_refused(tmp_path):
    class Strange(Tiny):
        def configure_optimizers(self):
            self.other = [nn.Linear(2, 2)]
            return torch.optim.SGD(self.other[0].parameters(), lr=0.1)

    with pytest.raises(polyak.MismatchError, match="none of the optimiser's 2 tensors belongs to the averager's model"):
        fitted(tmp_path, model=Strange())
