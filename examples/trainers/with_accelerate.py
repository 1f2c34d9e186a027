"""A loop of Accelerate with an average: train, stop, resume, keep the best, and serve it without polyak.

pip install 'polyak[accelerate]' scikit-learn
python examples/trainers/with_accelerate.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from data import Network, digits, loss
from torch.utils.data import DataLoader

from polyak.integrations.accelerate import average, save_average


class Program:
    """What each start of the program makes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        batches = DataLoader(digits()[0], batch_size=16, shuffle=True, drop_last=True)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(model, optimizer, batches)
        self.averager = average(self.accelerator, self.model, self.optimizer, "ema_debiased", decay=0.98)

    def epoch(self) -> float:
        """Train for one epoch, and return the average's loss on the digits that were held out."""
        self.model.train()
        for images, labels in self.batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(torch.nn.functional.cross_entropy(self.model(images), labels))
                self.optimizer.step()
                self.optimizer.zero_grad()
        with self.averager.applied():
            return loss(self.model)


def main() -> None:
    """Train in two starts, and compare the best average with its recorded score."""
    with TemporaryDirectory() as folder:
        program, best = Program(), float("inf")
        for gone in (False, False, True, False):
            if gone:  # the machine was, after two epochs
                program = Program()
                program.accelerator.load_state(f"{folder}/state")
            if (score := program.epoch()) < best:
                best = score
                save_average(program.accelerator, program.averager, program.model, f"{folder}/best")
            program.accelerator.save_state(f"{folder}/state")
        print(f"updates: {program.averager.n}")
        print(f"the best average: {best:.6f}")
        serve = [sys.executable, str(Path(__file__).with_name("serve.py")), f"{folder}/best/model.safetensors"]
        served = subprocess.run(serve, check=True, capture_output=True, text=True).stdout
        print(f"without polyak:   {served.strip()}")


if __name__ == "__main__":
    main()
