"""Lightning under DDP: one average on all ranks, resumed exactly; the folder is the first argument."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recorded import Record, bits, equal, near
from torch import nn

import polyak
from polyak.integrations.lightning import AveragingCallback

DECAY = 0.7


class Tiny(LightningModule):
    """A small regression."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.record = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), None

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        now = bits(dict(self.named_parameters()))
        assert near(now, self.record.ema(DECAY)) or self.trainer.ckpt_path
        self.log("val", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        self.record = Record(self).follow(optimizer)
        return optimizer


def fit(folder, *callbacks, **settings):
    averaging, model = AveragingCallback("ema", decay=DECAY), Tiny()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=True,
        callbacks=[averaging, *callbacks], enable_checkpointing=bool(callbacks), num_sanity_val_steps=0,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), batch_size=4)
    trainer.fit(model, batches, batches, **settings)
    polyak.distributed.verify_in_sync(averaging.averager)
    return model, averaging.averager


folder = Path(sys.argv[1])
model, averager = fit(folder, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
assert averager.n == 8
assert near(averager.averages, model.record.ema(DECAY))
dist.barrier()
_, again = fit(folder, ckpt_path=folder / "epoch=0.ckpt")
assert again.n == 8
assert equal(bits(again.averages), bits(averager.averages))
dist.barrier()
dist.destroy_process_group()
# Modules refer to the process group, and gloo aborts if a group outlives the interpreter (pytorch/pytorch#190489).
sys.stdout.flush()
os._exit(0)
