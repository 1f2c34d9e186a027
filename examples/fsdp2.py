"""An average of a sharded model: train on any number of ranks, evaluate the average, save, go on with another number.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 1 examples/fsdp2.py --resume

A small network learns scikit-learn's handwritten digits, its parameters sharded by FSDP2. Each rank averages its own
shards. Runs on CPUs (gloo); where each rank has a GPU it takes those (NCCL).
"""

from __future__ import annotations

import gc
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak

BATCH = 64  # digits per step, of all ranks together


class Training:
    """The model, its optimiser and how far they are, as ``torch.distributed.checkpoint`` saves and loads them."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 97), nn.ReLU(), nn.Linear(97, 97), nn.ReLU(), nn.Linear(97, 10))
        self.model.to(device)
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
        self.step = 0

    def state_dict(self) -> dict[str, object]:
        """Return what a resume needs."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from there."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


def data(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return digits and classes to learn from, and others to measure with."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order].to(device)
    y = torch.tensor(digits.target)[order].to(device)
    return x[:1200], y[:1200], x[1200:], y[1200:]


def train(training: Training, averager: polyak.Averager, x: Tensor, y: Tensor, until: int) -> None:
    """Train to a step; each rank has its part of each batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    while training.step < until:
        chosen = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(training.step))
        own = chosen[rank::ranks].to(x.device)
        nn.functional.cross_entropy(training.model(x[own]), y[own]).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.step += 1
        averager.update(step=training.step)


@torch.no_grad()
def wrong(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of digits that are taken for others; all ranks ask, since each has but a part of the model."""
    return float((model(x).argmax(1) != y).float().mean())


def main() -> None:
    """Train, average, evaluate, save."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, on any number of ranks")
    parser.add_argument("--steps", type=int, default=150, help="steps to train from here (default: 150)")
    parser.add_argument("--folder", type=Path, default=Path("fsdp2-checkpoints"), help="where the checkpoints are")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())

    training = Training(device)
    averager = polyak.average(training.model, "ema", decay=0.98)  # after sharding: the average is sharded alike
    if args.resume:
        saved = [*args.folder.glob("step-*/average")]
        if not saved:
            raise SystemExit(f"--resume: there is no checkpoint in {str(args.folder)!r}; train without it first")
        last = max(saved).parent
        dcp.load({"training": training}, checkpoint_id=last / "training")
        polyak.distributed.load(averager, last / "average")
    learn_x, learn_y, test_x, test_y = data(device)
    start = training.step
    train(training, averager, learn_x, learn_y, until=start + args.steps)

    raw = wrong(training.model, test_x, test_y)
    with averager.applied():  # swaps the shards in, and out again
        averaged = wrong(training.model, test_x, test_y)
    # A folder for each step, and the average last: where there is one, all of it is there.
    folder = args.folder / f"step-{training.step:06}"
    dcp.save({"training": training}, checkpoint_id=folder / "training")
    polyak.distributed.save(averager, folder / "average")
    held = sum(tensor.to_local().nbytes for tensor in averager.averages.values())
    whole = averager.averaged_state_dict(full=True)  # on the CPU of rank 0, {} elsewhere
    if dist.get_rank() == 0:
        everything = sum(tensor.nbytes for tensor in whole.values())
        print(f"steps {start + 1} to {training.step} on {dist.get_world_size()} rank(s), {averager.n} updates averaged")
        print(f"errors: {raw:.1%} raw, {averaged:.1%} averaged")
        print(f"rank 0 holds {held} of {everything} bytes of the average; saved in {folder}")
    # They refer to the process group; gloo aborts if a group outlives the interpreter (pytorch/pytorch#190489).
    del training, averager, whole
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
