"""The Hugging Face Trainer with an average: what evaluations see, checkpoints hold and a resume restores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import torchrun
from recorded import Record, bits, equal, near
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import polyak
from polyak.integrations.transformers import AveragingMixin, average_trainer

DECAY = 0.7


class Tiny(nn.Module):
    """A model with dropout and batch norm: random numbers and buffers count, too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.seen = []

    def forward(self, x, labels=None):
        self.seen.append((self.training, bits(dict(self.named_parameters()))))
        logits = self.net(x.to(self.net[0].weight.dtype)).float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return [{"x": row, "labels": int(row.sum() > 0)} for row in x]


def arguments(folder, **settings):
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2, "use_cpu": True, "seed": 3,
        "optim": "adamw_torch", "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **settings})


class Recorder(TrainerCallback):
    """Records the weights behind each step of the trainer's optimiser."""

    def __init__(self, model):
        self.record = Record(model)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.record.follow(optimizer.optimizer)

    def on_train_end(self, *args, **kwargs):
        self.record.handle.remove()


def trained(
    folder,
    *,
    averaged=True,
    model=None,
    cls=Trainer,
    callbacks=(),
    resume=None,
    strategy="ema",
    options=None,
    **settings,
):
    torch.manual_seed(0)
    model = model or Tiny()
    recorder = Recorder(model)
    trainer = cls(
        model,
        arguments(folder, **settings),
        train_dataset=rows(),
        eval_dataset=rows(16, 2),
        callbacks=[recorder, *callbacks],
    )
    options = {"decay": DECAY} if options is None else options
    averaging = average_trainer(trainer, strategy, **options) if averaged else None
    trainer.train(resume_from_checkpoint=resume)
    return trainer, averaging, recorder.record


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_n_counts_the_real_steps_and_the_average_is_the_reference(tmp_path, settings):
    _, averaging, record = trained(tmp_path, **settings)
    assert averaging.averager.n == len(record.steps) == 6
    assert near(averaging.averager.averages, record.ema(DECAY))


def test_a_model_in_bfloat16_is_averaged_in_float32(tmp_path):
    torch.manual_seed(0)
    _, averaging, record = trained(tmp_path, model=Tiny().to(torch.bfloat16), learning_rate=0.5)
    assert {t.dtype for t in averaging.averager.averages.values() if t.is_floating_point()} == {torch.float32}
    assert near(averaging.averager.averages, record.ema(DECAY))


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 3}, {"eval_strategy": "steps", "eval_steps": 2}], ids=str
)
def test_the_weights_of_every_step_are_those_of_a_run_without_it(tmp_path, settings):
    _, _, ours = trained(tmp_path, **settings)
    _, _, plain = trained(tmp_path, averaged=False, **settings)
    assert len(ours.steps) == len(plain.steps)
    assert all(map(equal, ours.steps, plain.steps))


class Watch(TrainerCallback):
    """Notes the weights around each evaluation."""

    def __init__(self):
        self.after = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.after.append(bits(dict(model.named_parameters())))


def test_every_evaluation_within_the_training_sees_the_average_and_the_raw_weights_are_back(tmp_path):
    torch.manual_seed(0)
    model, seen = Tiny(), []
    trainer = Trainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=3, eval_on_start=True),
        train_dataset=rows(),
        eval_dataset={"one": rows(8, 2), "two": rows(8, 3)},
        callbacks=[recorder := Recorder(model), watch := Watch()],
    )

    class ByHand(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                trainer.predict(rows(8, 4))
                seen.append(bits(dict(model.named_parameters())))

    trainer.add_callback(ByHand())
    average_trainer(trainer, decay=DECAY)
    trainer.train()
    record = recorder.record
    evaluated = [weights for training, weights in model.seen if not training]
    at = [0, 0, 3, 3, 5, 6, 6]  # steps at which each data set was evaluated, and a prediction made by hand
    assert len(evaluated) == len(at)
    for step, weights in zip(at, evaluated, strict=True):
        assert near(weights, record.ema(DECAY, steps=record.steps[:step]))
    raw = [record.start, record.start, record.steps[2], record.steps[2], record.steps[5], record.steps[5]]
    assert all(map(equal, watch.after, raw))
    assert equal(seen[0], record.steps[4])
    assert not near(evaluated[2], {name: w.double() for name, w in record.steps[2].items()})


def test_after_training_the_model_holds_the_average_and_evaluations_by_hand_see_it(tmp_path):
    trainer, averaging, record = trained(tmp_path)
    assert near(bits(dict(trainer.model.named_parameters())), record.ema(DECAY))
    before = trainer.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "final")
    model = Tiny()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "final" / "model.safetensors"))
    again = Trainer(model, arguments(tmp_path), eval_dataset=rows(16, 2))
    assert again.evaluate()["eval_loss"] == before
    assert not averaging.averager.is_applied


def language(folder, **settings):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    data = [{"input_ids": (ids := torch.randint(0, 17, (8,)).tolist()), "labels": ids} for _ in range(24)]
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=data[:16], eval_dataset=data[16:])
    return trainer, data


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 8,
}  # fmt: skip

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "polyak": raise ImportError("polyak is not installed")
sys.meta_path.insert(0, Missing())
import torch, json
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
data = torch.load(sys.argv[2])
args = TrainingArguments(output_dir=sys.argv[3], report_to=[], disable_tqdm=True, use_cpu=True)
print("loss", Trainer(model, args, eval_dataset=data).evaluate()["eval_loss"])
assert "polyak" not in sys.modules
"""


@pytest.mark.parametrize("checkpoint", ["average", "raw"])
def test_the_best_model_is_the_average_that_had_the_best_score(tmp_path, checkpoint):
    trainer, data = language(tmp_path, **BEST)
    averaging = average_trainer(trainer, decay=DECAY, checkpoint=checkpoint)
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == best
    assert averaging.averager.n == 8
    if checkpoint == "average":
        torch.save(data[16:], tmp_path / "data.pt")
        command = [
            sys.executable,
            "-c",
            WITHOUT,
            trainer.state.best_model_checkpoint,
            str(tmp_path / "data.pt"),
            str(tmp_path),
        ]
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout
        assert float(told.split("loss ")[1]) == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("checkpoint", ["average", "raw"])
@pytest.mark.parametrize("strategy", ["ema", "lawa"])
def test_a_resume_in_the_middle_of_an_epoch_from_another_folder_goes_on_with_the_same_bits(
    tmp_path, checkpoint, strategy
):
    options = {"checkpoint": checkpoint} | ({"decay": DECAY} if strategy == "ema" else {"window": 3})
    settings = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 5,
        "gradient_accumulation_steps": 2,
        "strategy": strategy,
        "options": options,
    }
    _, whole, record = trained(tmp_path / "a", **settings)
    Path(tmp_path / "b").mkdir()
    Path(tmp_path / "a" / "checkpoint-5").rename(tmp_path / "b" / "moved")
    _, resumed, rest = trained(tmp_path / "c", resume=str(tmp_path / "b" / "moved"), **settings)
    assert resumed.averager.n == 8
    assert all(map(equal, rest.steps, record.steps[5:]))
    assert equal(bits(resumed.averager.averages), bits(whole.averager.averages))
    shares = [averaging.averager.profile().shares.tolist() for averaging in (whole, resumed)]
    assert shares[0] == shares[1]


def test_a_checkpoint_without_an_average_resumes_with_one_warning(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    _, _, plain = trained(tmp_path, averaged=False, **settings)
    with pytest.warns(polyak.PolyakWarning, match="holds no average; the average begins anew") as told:
        _, averaging, record = trained(tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert len([warning for warning in told if warning.category is polyak.PolyakWarning]) == 1
    assert all(map(equal, record.steps, plain.steps[3:]))
    assert averaging.averager.n == 3
    assert near(averaging.averager.averages, record.ema(DECAY, start=plain.steps[2]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_an_evaluation_is_raised_again_and_leaves_the_raw_weights(tmp_path, error):
    torch.manual_seed(0)
    model = Tiny()
    trainer = Trainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=1),
        train_dataset=rows(),
        eval_dataset=rows(16, 2),
        callbacks=[recorder := Recorder(model)],
    )
    averaging = average_trainer(trainer, decay=DECAY)
    forward = model.forward

    def broken(x, labels=None):
        if not model.training:
            raise error(*["in the evaluation"])
        return forward(x, labels)

    model.forward = broken
    with pytest.raises(error, match="in the evaluation"):
        trainer.train()
    del model.forward
    record = recorder.record
    assert not averaging.averager.is_applied
    assert equal(bits(dict(model.named_parameters())), record.steps[3])
    # What is saved on that occasion is right, too, and so is an evaluation by hand.
    trainer._save_checkpoint(model, None)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert near(saved, record.ema(DECAY))
    trainer.evaluate()
    assert near(model.seen[-1][1], record.ema(DECAY))
    assert equal(bits(dict(model.named_parameters())), record.steps[3])
    # The trainer can be used again, and goes on exactly.
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert averaging.averager.n == 6
    _, whole, _ = trained(tmp_path / "whole", eval_strategy="steps", eval_steps=4)
    assert equal(bits(averaging.averager.averages), bits(whole.averager.averages))


def test_early_stopping_follows_the_metric_of_the_average(tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    settings = {**BEST, "eval_steps": 1, "save_steps": 1, "learning_rate": 3.0, "max_steps": 20}
    trainer, averaging, _ = trained(tmp_path, callbacks=[stop], **settings)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == averaging.averager.n < 20
    assert losses[-1] >= min(losses[:-1])
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_a_scheduler_on_plateau_follows_the_metric_of_the_average(tmp_path):
    told = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, *args, **kwargs):
            told.append(float(metrics))
            super().step(metrics, *args, **kwargs)

    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            metric_for_best_model="eval_loss",
            lr_scheduler_type="reduce_lr_on_plateau",
        ),
        train_dataset=rows(),
        eval_dataset=rows(16, 2),
        optimizers=(optimizer, Plateau(optimizer)),
    )
    average_trainer(trainer, decay=DECAY)
    trainer.train()
    assert told == [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


LOGGED = {f"polyak/{name}" for name in ("rate", "distance", "half_life", "n", "skipped", "held")}


@pytest.mark.parametrize("log", [True, False])
def test_the_trainers_own_logs_of_the_loss_get_numbers_of_the_average(tmp_path, log):
    options = {"decay": DECAY, "log": log}
    trainer, _, record = trained(tmp_path, options=options, logging_steps=2, eval_strategy="steps", eval_steps=3)
    for entry in trainer.state.log_history:
        assert LOGGED & {*entry} == (LOGGED if log and "loss" in entry else set())
    if log:
        told = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["polyak/n"] for entry in told] == [2, 4, 6]
        average = record.ema(DECAY, steps=record.steps[:4])
        apart = [(record.steps[3][name].double() - average[name]).square().sum() for name in average]
        assert told[1]["polyak/distance"] == pytest.approx(float(sum(apart)) ** 0.5, rel=1e-5)


def test_a_second_training_begins_anew_and_leaves_no_hooks(tmp_path):
    trainer, averaging, _ = trained(tmp_path)
    optimizer, first = trainer.optimizer.optimizer, averaging.averager
    assert not [hook for hook in optimizer._optimizer_step_post_hooks.values() if "polyak" in type(hook).__module__]
    trainer.train()
    assert averaging.averager is not first
    assert (averaging.averager.n, first.n) == (6, 6)


def test_a_class_of_trainers_with_the_mixin(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Averaged(AveragingMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    model, args = Tiny(), arguments(tmp_path)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Averaged(model, args, train_dataset=rows(), average={"name": "ema", "decay": DECAY})
    trainer.train()
    assert trainer.averaging.averager.n == 4
    assert near(
        bits(dict(model.named_parameters())),
        {n: t.double() for n, t in trainer.averaging.averager.averages.items() if n in dict(model.named_parameters())},
    )
    plain = Averaged(Tiny(), args, train_dataset=rows())
    plain.train()
    assert plain.averaging is None


def test_a_subclass_of_yours_keeps_its_methods(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            self.asked = True
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    trainer, averaging, _ = trained(tmp_path, cls=Mine)
    assert trainer.asked
    assert isinstance(trainer, Mine)
    assert type(trainer).__name__ == "Mine"
    assert averaging.averager.n == 6


def test_adapters_alone_are_averaged_saved_and_resumed(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(folder, **settings):
        trainer, data = language(folder, **settings)
        model = peft.get_peft_model(
            trainer.model, peft.LoraConfig(target_modules=["c_attn"], r=2, lora_dropout=0.0, fan_in_fan_out=True)
        )
        trainer = Trainer(model, trainer.args, train_dataset=data[:16], eval_dataset=data[16:])
        return trainer, average_trainer(trainer, decay=DECAY)

    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    trainer, whole = adapted(tmp_path, **settings)
    trainer.train()
    assert whole.averager.averages
    assert all("lora_" in name for name in whole.averager.averages)
    assert {*map(str, Path(tmp_path / "checkpoint-4" / "polyak").iterdir())} == {
        str(tmp_path / "checkpoint-4" / "polyak" / name) for name in ("averager.pt", "weights.pt")
    }
    again, resumed = adapted(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(bits(resumed.averager.averages), bits(whole.averager.averages))
    plain, _ = adapted(tmp_path / "c", **settings)
    loaded = peft.PeftModel.from_pretrained(plain.model.get_base_model(), tmp_path / "checkpoint-6")
    saved = dict(loaded.named_parameters())
    assert near(
        {name: saved[name] for name in whole.averager.averages},
        {n: t.double() for n, t in whole.averager.averages.items()},
    )


def test_a_config_file_is_taken_by_its_path_or_name(tmp_path):
    file = tmp_path / "average.toml"
    file.write_text('every = 2\n[strategy]\nname = "ema"\ndecay = 0.5\n', encoding="utf-8")
    for given in (file, str(file)):
        _, averaging, _ = trained(tmp_path, strategy=given, options={})
        assert averaging.averager.n == 3
        assert averaging.averager.strategy == polyak.EMA(decay=0.5)


# Bad input


def trainer_of(tmp_path, **settings):
    return Trainer(Tiny(), arguments(tmp_path, **settings), train_dataset=rows(), eval_dataset=rows(8))


def test_an_unknown_strategy_is_named_before_training_starts(tmp_path):
    with pytest.raises(polyak.UnknownStrategyError, match=r"no strategy is called 'emma'. Did you mean 'ema'"):
        average_trainer(trainer_of(tmp_path), "emma")


def test_an_unknown_setting_is_named_before_training_starts(tmp_path):
    with pytest.raises(polyak.ConfigError, match=r"average_trainer\(\): the settings.*\n.*decoy.*Did you mean 'decay'"):
        average_trainer(trainer_of(tmp_path), "ema", decoy=0.5)


def test_two_averages_that_evaluate_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    average_trainer(trainer)
    with pytest.raises(
        polyak.ConfigError, match=r"has an average already.*polyak\.attach\(trainer\.optimizer, averager\)"
    ):
        average_trainer(trainer, "swa")


def test_a_callback_in_another_trainer_is_refused(tmp_path):
    averaging = average_trainer(trainer_of(tmp_path))
    with pytest.raises(polyak.ConfigError, match=r"belongs to another trainer.*average_trainer"):
        Trainer(Tiny(), arguments(tmp_path), train_dataset=rows(), callbacks=[averaging])
    other = trainer_of(tmp_path)
    other.add_callback(averaging)
    with pytest.raises(polyak.ConfigError, match=r"belongs to another trainer.*average_trainer"):
        other.train()


def test_the_best_model_without_evaluations_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, **BEST)
    trainer.args.eval_strategy = "no"
    with pytest.raises(
        polyak.ConfigError, match=r"load_best_model_at_end=True chooses by evaluations.*set eval_strategy"
    ):
        average_trainer(trainer)


def test_the_best_model_of_checkpoints_without_an_average_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, **BEST, save_only_model=True)
    with pytest.raises(polyak.ConfigError, match="holds none with checkpoint='raw' and save_only_model=True"):
        average_trainer(trainer, checkpoint="raw")


def test_what_is_no_trainer_and_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(polyak.ArgumentError, match=r"got <Linear>; expected a transformers\.Trainer"):
        average_trainer(nn.Linear(2, 1))
    with pytest.raises(polyak.ConfigError, match="checkpoint='best' is unknown; expected 'average' or 'raw'"):
        average_trainer(trainer_of(tmp_path), checkpoint="best")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    trained(folder, save_strategy="steps", save_steps=3, max_steps=3)
    return folder / "checkpoint-3"


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path, checkpoint):
    with pytest.raises(polyak.StateError, match="strategy"):
        trained(tmp_path, resume=str(checkpoint), strategy="swa", options={})


def test_a_checkpoint_of_another_model_is_refused(tmp_path, checkpoint):
    trainer, _ = language(tmp_path, max_steps=6)
    trainer.model.register_buffer("score", torch.zeros(2))
    model = checkpoint.parent / "language"
    if not model.exists():
        first, _ = language(model, max_steps=3, save_strategy="steps", save_steps=3)
        average_trainer(first, decay=DECAY)
        first.train()
    average_trainer(trainer, decay=DECAY)
    with pytest.raises(polyak.StateError, match=r"belong to another model: missing: score"):
        trainer.train(resume_from_checkpoint=str(model / "checkpoint-3"))


@pytest.mark.parametrize("name", ["averager.pt", "weights.pt"])
def test_a_damaged_checkpoint_is_refused(tmp_path, checkpoint, name):
    import shutil

    shutil.copytree(checkpoint, tmp_path / "damaged")
    file = tmp_path / "damaged" / "polyak" / name
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(polyak.StateError, match=f"{name}.*is damaged or incomplete"):
        trained(tmp_path, resume=str(tmp_path / "damaged"))


def test_an_optimiser_of_another_model_is_refused(tmp_path):
    optimizer = torch.optim.SGD(Tiny().parameters(), lr=0.1)
    trainer = Trainer(Tiny(), arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    average_trainer(trainer)
    with pytest.raises(polyak.MismatchError, match="none of the optimiser's 6 tensors belongs to the averager's model"):
        trainer.train()


@pytest.mark.slow
def test_two_ranks_average_in_sync_and_resume_exactly(tmp_path):
    torchrun("transformers_ddp.py", tmp_path)
