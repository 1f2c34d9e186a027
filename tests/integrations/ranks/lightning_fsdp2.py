"""Lightning under FSDP2: each rank averages its shards; checkpoints are whole, and resumed exactly.

Arguments: the folder, whether checkpoints are "distributed" or "full", and the number of ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from recorded import equal
from torch import nn
from torch.distributed.fsdp import fully_shard

import polyak
from polyak.integrations.lightning import AveragingCallback

DECAY = 0.7


def whole(tensors):
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in tensors}


class Tiny(LightningModule):
    """A small regression, sharded."""

    def __init__(self):
        super().__init__()
        self.net, self.steps, self.start = None, [], None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).square().mean(), sync_dist=True)

    def on_train_start(self):
        self.start = whole(self.named_parameters())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.steps.append(whole(self.named_parameters()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(folder, distributed, *callbacks, epochs=2, **settings):
    averaging, model = AveragingCallback("ema", decay=DECAY, at_end="raw"), Tiny()
    strategy = ModelParallelStrategy(
        data_parallel_size=int(sys.argv[3]), tensor_parallel_size=1, save_distributed_checkpoint=distributed,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=int(sys.argv[3]), strategy=strategy, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[averaging, *callbacks], enable_checkpointing=bool(callbacks), num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), batch_size=4)
    trainer.fit(model, batches, batches, **settings)
    return model, averaging.averager


folder, distributed = Path(sys.argv[1]), sys.argv[2] == "distributed"
if (file := folder / "epoch=0.ckpt").exists():  # a resume on another number of ranks
    _, again = fit(folder, distributed, ckpt_path=file)
    found, expected = whole(again.averages.items()), torch.load(folder / "expected.pt")
    assert again.n == 8
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())
else:
    model, averager = fit(folder, distributed, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    found = whole(averager.averages.items())
    average = {name: tensor.double() for name, tensor in model.start.items()}
    for weights in model.steps:
        for name, tensor in average.items():
            tensor.add_((1 - DECAY) * (weights[name].double() - tensor))
    assert averager.n == 8
    assert all(torch.allclose(found[name].double(), tensor, atol=1e-6) for name, tensor in average.items())
    polyak.distributed.verify_in_sync(averager)
    dist.barrier()
    again_model, again = fit(folder, distributed, ckpt_path=file)
    assert all(map(equal, again_model.steps, model.steps[4:]))
    assert equal(whole(again.averages.items()), found)
    if dist.get_rank() == 0:
        torch.save(found, folder / "expected.pt")
        meta = torch.load(file / "meta.pt" if distributed else file, weights_only=True)
        raw = {name: meta["current_model_state"][name] for name in model.steps[3]}
        assert equal(raw, model.steps[3])
dist.barrier()
dist.destroy_process_group()
# Modules refer to the process group, and gloo aborts if a group outlives the interpreter (pytorch/pytorch#190489).
sys.stdout.flush()
os._exit(0)
