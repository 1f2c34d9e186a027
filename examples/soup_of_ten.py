"""A soup of ten fine-tuned models: what it gains, or loses, and how far that differs from seed to seed.

A network learns digits from noisy images, and is then fine-tuned ten times on clear ones, with ten learning rates and
shuffles. A part of the data chooses: the best single model, the uniform soup and the greedy soup.
Another part, which nothing was chosen by, tests them. It takes a minute.

    python examples/soup_of_ten.py
    python examples/soup_of_ten.py --seeds 3 --plot soup.png
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak import files

MODELS = 10
Part = tuple[Tensor, Tensor]


class Digits(NamedTuple):
    """Digits to learn, to choose by and to test, disjoint."""

    learn: Part
    choose: Part
    test: Part


def digits(seed: int) -> Digits:
    """Return digits split by a seed."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return Digits((x[:500], y[:500]), (x[500:1100], y[500:1100]), (x[1100:], y[1100:]))


def network() -> nn.Sequential:
    """Return the network."""
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def train(model: nn.Module, part: Part, rate: float, epochs: int) -> None:
    """Train a model."""
    x, y = part
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(25):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def accuracy(part: Part, state: dict[str, Tensor]) -> float:
    """Return the accuracy of a state dict."""
    model = network()
    model.load_state_dict(state)
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).float().mean())


def fine_tuned(seed: int, data: Digits, folder: Path) -> list[Path]:
    """Leave ten fine-tuned models of one base."""
    torch.manual_seed(seed)
    base = network()
    noisy = data.learn[0] + 0.5 * torch.randn_like(data.learn[0])
    train(base, (noisy, data.learn[1]), 0.02, 15)
    paths = []
    for number in range(MODELS):
        model = network()
        model.load_state_dict(base.state_dict())
        torch.manual_seed(1000 * seed + number)
        train(model, data.learn, 0.01 * 1.25**number, 6)
        paths.append(folder / f"model-{number}.pt")
        torch.save(model.state_dict(), paths[-1])
    return paths


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how often (default: 5)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the last greedy soup")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds: expected 1 or more")
    torch.set_num_threads(1)
    gains: dict[str, list[float]] = {"uniform": [], "greedy": []}
    print("test accuracy       the best single   uniform soup    greedy soup (models kept)")
    for seed in range(args.seeds):
        data = digits(seed)
        with TemporaryDirectory() as name:
            folder = Path(name)
            paths = fine_tuned(seed, data, folder)
            score = partial(accuracy, data.choose)
            made = {
                how: files.soup(paths, score, how=how, work=folder / "work", out=folder / f"{how}.pt")
                for how in ("greedy", "uniform")
            }
            best = accuracy(data.test, torch.load(made["greedy"].ingredients[0].file, weights_only=True))
            tested = {how: accuracy(data.test, torch.load(one.out, weights_only=True)) for how, one in made.items()}
        for how, value in tested.items():
            gains[how].append(value - best)
        kept = len(made["greedy"].kept)
        print(f"seed {seed:<14}{best:15.2%}{tested['uniform']:15.2%}{tested['greedy']:15.2%} ({kept})")
    for how, values in gains.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"gain of the {how} soup: {100 * statistics.mean(values):+.2f} ± {100 * spread:.2f} points over seeds")
    if args.plot is not None:
        axes = made["greedy"].plot(label="accuracy on the data that chose")
        axes.figure.savefig(args.plot, dpi=130)
        print(f"picture: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
