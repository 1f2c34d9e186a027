"""Average the checkpoints that a run left behind, in three layouts, by the one command.

A small network learns scikit-learn's handwritten digits at a constant learning rate and leaves a checkpoint after each
of its last epochs, as three kinds of trainers do: a folder with `model.safetensors`, one `.ckpt` file with the state of
the optimiser and the prefixes of DDP, and a folder of `torch.distributed.checkpoint`. `polyak average` averages each of
them, and the table says what that is worth on held-out digits. It takes half a minute.

    python examples/average_files.py
    python examples/average_files.py --seeds 5 --last 10
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak import files

LAYOUTS = {"folder": "checkpoint-*", "ckpt": "step=*.ckpt", "dcp": "step-*"}
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def network() -> nn.Sequential:
    """Return the network."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits(seed: int) -> Data:
    """Return digits to learn and to test, split by a seed."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return x[:1000], y[:1000], x[1000:], y[1000:]


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, runs: Path) -> None:
    """Leave a checkpoint in each layout."""
    state = model.state_dict()
    folder = runs / "folder" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (runs / "ckpt").mkdir(exist_ok=True)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    whole = {"state_dict": wrapped, "optimizer_states": [optimizer.state_dict()], "global_step": step, "epoch": 0}
    torch.save(whole, runs / "ckpt" / f"step={step}.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is meant
        dcp.save({"model": state, "step": step}, checkpoint_id=runs / "dcp" / f"step-{step}")


def train(seed: int, epochs: int, last: int, runs: Path) -> Data:
    """Train, leave checkpoints, and return the data."""
    data = digits(seed)
    x, y, *_ = data
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(y)).split(20):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        if epoch > epochs - last:
            save(model, optimizer, epoch * len(y) // 20, runs)
    return data


def test_loss(path: Path, data: Data) -> float:
    """Return the test loss of a checkpoint of any layout."""
    model = network()
    with files.open(path) as checkpoint:
        model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.names})
    with torch.no_grad():
        return float(cross_entropy(model(data[2]), data[3]))


def averaged(layout: str, runs: Path, last: int) -> Path:
    """Average the checkpoints of a layout by the command line."""
    out = runs / {"folder": "average", "ckpt": "average.ckpt", "dcp": "average.safetensors"}[layout]
    inputs = sorted(map(str, (runs / layout).glob(LAYOUTS[layout])))
    command = [sys.executable, "-m", "polyak", "average", *inputs, "--last", str(last), "-o", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs (default: 3)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="passes over the data (default: 20)")
    parser.add_argument("--last", type=int, default=5, metavar="N", help="checkpoints to average (default: 5)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not 1 < args.last <= args.epochs:
        parser.error("expected 1 seed or more, and from 2 checkpoints on, at most one per epoch")
    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        with TemporaryDirectory() as folder:
            runs = Path(folder)
            data = train(seed, args.epochs, args.last, runs)
            singles = sorted((runs / "folder").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
            alone = [test_loss(path, data) for path in singles]
            losses.setdefault("the last checkpoint", []).append(alone[-1])
            losses.setdefault("the best one (chosen by the test)", []).append(min(alone))
            for layout in LAYOUTS:
                loss = test_loss(averaged(layout, runs, args.last), data)
                losses.setdefault(f"average of the last {args.last}, {layout}", []).append(loss)
    print(f"{'':36}test loss   ± over {args.seeds} seeds")
    for label, values in losses.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{label:36}{statistics.mean(values):9.4f}   {spread:.4f}")
    last, average = losses["the last checkpoint"], losses[f"average of the last {args.last}, folder"]
    lower = sum(a < b for a, b in zip(average, last, strict=True))
    print(f"The average is better than the last checkpoint for {lower} of {args.seeds} seeds.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
