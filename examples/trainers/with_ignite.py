"""Engines of Ignite with an average: train, stop, resume, keep the best, and serve it without polyak.

pip install 'polyak[ignite]' scikit-learn
python examples/trainers/with_ignite.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from data import Network, digits
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Loss
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyak.integrations.ignite import AveragingHandler


class Program:
    """What each start of the program makes."""

    def __init__(self, folder: str) -> None:
        torch.manual_seed(0)
        self.model = Network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.trainer, self.evaluator = Engine(self.step), Engine(self.evaluate)
        Loss(nn.functional.cross_entropy).attach(self.evaluator, "loss")

        self.averaging = AveragingHandler(self.model, "ema_debiased", decay=0.98)
        self.averaging.attach(self.trainer, self.optimizer)
        self.averaging.attach_evaluator(self.evaluator)

        learn, choose = digits()
        self.batches, self.choose = DataLoader(learn, batch_size=32, shuffle=True), DataLoader(choose, batch_size=512)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run(self.choose))
        self.resume = {
            "model": self.model, "optimizer": self.optimizer, "trainer": self.trainer, "averaging": self.averaging,
        }  # fmt: skip
        disk = DiskSaver(folder, require_empty=False)
        self.saver = Checkpoint(self.resume, disk, filename_pattern="resume.pt")
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.saver)
        self.best = Checkpoint(
            {"averaged": self.averaging.averaged}, disk, score_name="score", score_function=self.score
        )
        self.evaluator.add_event_handler(Events.COMPLETED, self.best)
        self.scores: list[float] = []

    def step(self, _: Engine, batch: tuple[Tensor, Tensor]) -> None:
        """Train with a batch."""
        self.model.train()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(batch[0]), batch[1]).backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, _: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and labels of a batch."""
        return self.model.eval()(batch[0]), batch[1]

    def score(self, engine: Engine) -> float:
        """Return what is best where it is highest."""
        self.scores.append(engine.state.metrics["loss"])
        return -self.scores[-1]


def main() -> None:
    """Train in two starts, and compare the best average with its recorded score."""
    with TemporaryDirectory() as folder:
        program = Program(folder)
        program.trainer.run(program.batches, max_epochs=2)  # the machine is gone after two epochs
        program = Program(folder)
        Checkpoint.load_objects(program.resume, torch.load(f"{folder}/resume.pt", weights_only=True))
        program.trainer.run(program.batches, max_epochs=4)
        print(f"updates: {program.averaging.averager.n}")
        print(f"the best average: {min(program.scores):.6f}")
        serve = [sys.executable, str(Path(__file__).with_name("serve.py")), str(program.best.last_checkpoint)]
        served = subprocess.run(serve, check=True, capture_output=True, text=True).stdout
        print(f"without polyak:   {served.strip()}")


if __name__ == "__main__":
    main()
