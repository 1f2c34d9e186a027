"""The Hugging Face Trainer under DDP: one average on all ranks, resumed exactly; the folder is the first argument."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from recorded import Record, bits, equal, near
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import polyak
from polyak.integrations.transformers import average_trainer

DECAY = 0.7


class Tiny(nn.Module):
    """A small regression."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, labels=None):
        return {"loss": (self.net(x) - labels).square().mean()}


class Recorder(TrainerCallback):
    """Records the weights behind each step."""

    def __init__(self, model):
        self.record = Record(model)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.record.follow(optimizer.optimizer)


def made(folder):
    torch.manual_seed(0)
    model = Tiny()
    rows = [
        {"x": x, "labels": x.sum(0, keepdim=True)}
        for x in torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    ]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        disable_tqdm=True, save_strategy="steps", save_steps=3, use_cpu=True, ddp_backend="gloo",
        eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, lr_scheduler_type="constant",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:16], callbacks=[recorder := Recorder(model)])
    return trainer, average_trainer(trainer, "ema", decay=DECAY), recorder.record


folder = Path(sys.argv[1])
trainer, averaging, record = made(folder)
trainer.train()
assert dist.get_world_size() == 2
assert averaging.averager.n == len(record.steps) == 6
assert near(averaging.averager.averages, record.ema(DECAY))
polyak.distributed.verify_in_sync(averaging.averager)
best = trainer.state.best_metric
assert abs(trainer.evaluate()["eval_loss"] - best) < 1e-6
dist.barrier()

again, resumed, rest = made(folder / f"{dist.get_rank()}")
again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
assert all(map(equal, rest.steps, record.steps[3:]))
assert equal(bits(resumed.averager.averages), bits(averaging.averager.averages))
polyak.distributed.verify_in_sync(resumed.averager)
dist.barrier()
dist.destroy_process_group()
# Modules refer to the process group, and gloo aborts if a group outlives the interpreter (pytorch/pytorch#190489).
sys.stdout.flush()
os._exit(0)
