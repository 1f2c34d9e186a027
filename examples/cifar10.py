"""The classic CIFAR-10 network of PyTorch's "Training a Classifier", trained with an average of its weights beside it.

    python examples/cifar10.py --data data --download

The published result to compare with, after 10 epochs: about 63 % test accuracy for the model and 65 % for its average,
and a running loss of the average below that of the model in every print but the first.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

import polyak

Batches = DataLoader[tuple[Tensor, Tensor]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network() -> nn.Module:
    """Return the network: two convolutions and three linear layers, which start Xavier-normal with zero biases."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def loaders(args: Namespace) -> tuple[Batches, Batches]:
    """Return the training images, shuffled, and the test images, both in batches and scaled to [-1, 1]."""
    scaled = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    train = CIFAR10(args.data, train=True, transform=scaled, download=args.download)
    test = CIFAR10(args.data, train=False, transform=scaled)
    return (
        DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers),
        DataLoader(test, args.batch_size, num_workers=args.workers),
    )


def train(model: nn.Module, averager: polyak.Averager, training: Batches, testing: Batches, args: Namespace) -> None:
    """Train the model, feed the average after every optimiser step, and print how both are doing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * len(training), eta_min=1e-4)
    step, losses = 0, torch.zeros(2, device=DEVICE)
    for epoch in range(1, args.epochs + 1):
        for images, labels in training:
            inputs, targets = images.to(DEVICE), labels.to(DEVICE)
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            step += 1
            averager.update(step=step)
            with torch.no_grad():
                average_loss = F.cross_entropy(averager(inputs), targets)

            losses += torch.stack([loss.detach(), average_loss])
            if step % args.print_every == 0:
                of_model, of_average = (losses / args.print_every).tolist()
                print(f"epoch {epoch:2d}  step {step:5d}  loss: model {of_model:.3f}  average {of_average:.3f}")
                losses.zero_()
            if step == args.max_steps:
                break
        scheduler.step()
        of_model = accuracy(model, testing)
        with averager.applied():  # the model computes with the average, and has its own weights back afterwards
            of_average = accuracy(model, testing)
        print(f"epoch {epoch:2d}  test accuracy: model {of_model:.1%}  average {of_average:.1%}")
        if step == args.max_steps:
            return


@torch.no_grad()
def accuracy(model: nn.Module, testing: Batches) -> float:
    """Return the part of the test images that a model classifies correctly."""
    right = [model(images.to(DEVICE)).argmax(1).cpu() == labels for images, labels in testing]
    return torch.cat(right).float().mean().item()


def arguments(argv: list[str] | None) -> Namespace:
    """Return what the user asks for."""
    parser = ArgumentParser(usage="%(prog)s [options]", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="where CIFAR-10 is or goes (default: data)")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 (160 MiB) where it is not there")
    parser.add_argument("--epochs", type=_positive, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="images in a step (default: 64)")
    parser.add_argument("--print-every", type=_positive, default=200, help="steps between prints (default: 200)")
    parser.add_argument("--max-steps", type=_positive, help="stop after so many steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the images (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="decides the first weights and the order (default: 0)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        message = f"expected a whole number above 0, got {text!r}"
        raise ArgumentTypeError(message)
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the tutorial; return the exit status."""
    args = arguments(argv)
    try:
        training, testing = loaders(args)
    except (RuntimeError, OSError) as error:  # torchvision's: not there or not whole; the download failed
        why = f" ({error})" if args.download else ""
        where = "name its directory with --data DIR, or fetch it with --download"
        print(f"cifar10.py: there is no whole CIFAR-10 in {str(args.data)!r}{why}: {where}", file=sys.stderr)
        return 2
    torch.manual_seed(args.seed)
    model = network().to(DEVICE)
    averager = polyak.average(model, "ema_v3", decay=0.9998, use_warmup=True)
    train(model, averager, training, testing, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
