"""Lightning's Trainer with an average: train, stop, resume, keep the best, and serve it without polyak.

pip install 'polyak[lightning]' scikit-learn
python examples/trainers/with_lightning.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from data import Network, digits
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyak.integrations.lightning import AveragingCallback


class Classifier(LightningModule):
    """The network with its loss and its optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log the loss of a batch."""
        images, labels = batch
        self.log("loss", nn.functional.cross_entropy(self.network(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(folder: str, epochs: int, resume: str | None = None) -> tuple[AveragingCallback, ModelCheckpoint]:
    """Train as each start of the program does, and return the callbacks."""
    torch.manual_seed(0)
    averaging = AveragingCallback("ema_debiased", decay=0.98)
    best = ModelCheckpoint(folder, monitor="loss", filename="best", save_last=True, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=epochs, callbacks=[averaging, best], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    learn, choose = digits()
    trainer.fit(
        Classifier(),
        DataLoader(learn, batch_size=32, shuffle=True),
        DataLoader(choose, batch_size=512),
        ckpt_path=resume,
    )
    return averaging, best


def main() -> None:
    """Train in two starts, and compare the best checkpoint with its recorded score."""
    with TemporaryDirectory() as folder:
        fit(folder, epochs=2)  # the machine is gone after two epochs
        averaging, best = fit(folder, epochs=4, resume=f"{folder}/last.ckpt")
        print(f"updates: {averaging.averager.n if averaging.averager else 0}")
        print(f"the best average: {best.best_model_score:.6f}")
        serve = [sys.executable, str(Path(__file__).with_name("serve.py")), best.best_model_path]
        served = subprocess.run(serve, check=True, capture_output=True, text=True).stdout
        print(f"without polyak:   {served.strip()}")


if __name__ == "__main__":
    main()
