"""The Hugging Face Trainer with an average: train, stop, resume, keep the best, and serve it without polyak.

pip install 'polyak[transformers]' scikit-learn
python examples/trainers/with_transformers.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from data import Network, digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from polyak.integrations.transformers import average_trainer


class Classifier(nn.Module):
    """The network with its loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss and the logits."""
        logits = self.network(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def made(folder: str, steps: int) -> Trainer:
    """Return a trainer with an average, as each start of the program makes it."""
    learn, choose = ([{"images": x, "labels": y} for x, y in part] for part in digits())
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=0.01,
        eval_strategy="steps", eval_steps=40, save_strategy="steps", save_steps=40, logging_steps=40,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", lr_scheduler_type="constant",
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Classifier(), args, train_dataset=learn, eval_dataset=choose)
    average_trainer(trainer, "ema_debiased", decay=0.98)
    return trainer


def main() -> None:
    """Train in two starts, and compare the best checkpoint with its recorded score."""
    with TemporaryDirectory() as folder:
        made(folder, steps=80).train()  # the machine is gone after 80 steps
        trainer = made(folder, steps=160)
        trainer.train(resume_from_checkpoint=True)
        best = Path(trainer.state.best_model_checkpoint or "") / "model.safetensors"
        print(f"updates: {trainer.averaging.averager.n}")
        print(f"the best average: {trainer.state.best_metric:.6f}, in {best.parent.name}")
        serve = [sys.executable, str(Path(__file__).with_name("serve.py")), str(best)]
        served = subprocess.run(serve, check=True, capture_output=True, text=True).stdout
        print(f"without polyak:   {served.strip()}")


if __name__ == "__main__":
    main()
