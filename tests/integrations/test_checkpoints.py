"""What the trainers of other libraries leave, averaged from their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer as HuggingFaceTrainer, TrainingArguments

from polyak import files
from polyak.errors import ConfigError


class Module(LightningModule):
    def __init__(self, width: int = 8, path: Path = Path()) -> None:  # a path in the hyperparameters is a foreign class
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, batch, _):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def test_checkpoints_of_lightning(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(48, 4, generator=torch.Generator().manual_seed(0))), batch_size=8)
    saving = ModelCheckpoint(
        tmp_path / "runs", "{epoch}-{loss:.2f}", monitor="loss", save_top_k=-1, save_last=True, every_n_epochs=1
    )
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Module(path=tmp_path)
    trainer.fit(model, data)
    paths = sorted((tmp_path / "runs").glob("epoch=*.ckpt"))
    assert len(paths) == 3
    made = files.average(paths, last=2, out=tmp_path / "average.ckpt")
    assert made.steps == (12, 18)  # recorded, while the names end in a loss
    states = [torch.load(path, weights_only=False)["state_dict"] for path in made.files]
    average = torch.load(made.out)
    assert set(average) == set(model.state_dict())
    for name, value in average.items():
        if value.is_floating_point():
            wanted = sum(state[name].double() for state in states) / 2
            assert torch.equal(value, wanted.to(value.dtype))
        else:
            assert torch.equal(value, states[-1][name])
    model.load_state_dict(average)
    # `last.ckpt` is a checkpoint of the step of the last one: no order is guessed.
    with pytest.raises(ConfigError, match=r"'last\.ckpt' are both of step 18"):
        files.average([*paths, tmp_path / "runs" / "last.ckpt"], last=2, out=tmp_path / "o.ckpt")
    with files.open(paths[0]) as checkpoint:
        assert checkpoint.key == "state_dict"
        assert not any("optimizer" in note for note in checkpoint.notes)


def test_folders_of_the_hugging_face_trainer(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    rows = [{"input_ids": (row := torch.randint(0, 32, (6,))), "labels": row} for _ in range(8)]
    settings = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, save_steps=4, per_device_train_batch_size=4, learning_rate=0.1,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    HuggingFaceTrainer(LlamaForCausalLM(config), settings, train_dataset=rows).train()
    paths = sorted((tmp_path / "out").glob("checkpoint-*"))
    made = files.average(paths, last=2, out=tmp_path / "average")
    assert made.steps == (8, 12)  # 12 comes after 8, also where names are sorted as texts
    models = [LlamaForCausalLM.from_pretrained(path).state_dict() for path in made.files]
    average = LlamaForCausalLM.from_pretrained(made.out)
    for name, value in average.state_dict().items():
        assert torch.equal(value, ((models[0][name].double() + models[1][name].double()) / 2).to(value.dtype)), name
    assert average.lm_head.weight is average.model.embed_tokens.weight
    left = {path.name for path in made.out.iterdir()}
    assert "model.safetensors" in left
    assert "config.json" in left
    assert not left & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
