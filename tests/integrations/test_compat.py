"""The stand-ins for ignite's and Lightning's classes, beside the real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

ignite = pytest.importorskip("ignite", reason="needs the trainers: nox -s integrations")
pytest.importorskip("lightning", reason="as above")

from ignite.engine import Engine, Events  # noqa: E402 - behind the look for them
from ignite.handlers import EMAHandler as Theirs  # noqa: E402 - as above

import polyak  # noqa: E402 - as above
from polyak.compat.ignite import EMAHandler  # noqa: E402 - as above

averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="this Lightning has none")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def run(cls, event=Events.ITERATION_COMPLETED, name="ema_momentum", **options):
    model = network()
    handler, generator = cls(model, **options), torch.Generator().manual_seed(1)

    def step(engine, batch):
        model(torch.randn(8, 4, generator=generator))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    engine = Engine(step)
    handler.attach(engine, name, event=event)
    engine.run(range(50), max_epochs=2)
    return handler, engine


@pytest.mark.parametrize("buffers", ["copy", "update", "ema_train"])
@pytest.mark.parametrize("options", [{"momentum": 0.1}, {"momentum": 0.1, "momentum_warmup": 0.5, "warmup_iters": 20}])
@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=3)])
def test_ignites_handler_makes_the_same_numbers(buffers, options, event):
    theirs, their_engine = run(Theirs, event, handle_buffers=buffers, **options)
    ours, our_engine = run(EMAHandler, event, handle_buffers=buffers, **options)
    assert our_engine.state.ema_momentum == their_engine.state.ema_momentum
    assert ours.ema_model.training is theirs.ema_model.training
    expected = theirs.ema_model.state_dict()
    assert [*ours.ema_model.state_dict()] == [*expected]
    copied = {"copy": ("running", "batches"), "update": ("batches",), "ema_train": ()}[buffers]
    for name, value in ours.ema_model.state_dict().items():
        if any(part in name for part in copied) and event is not Events.ITERATION_COMPLETED:
            continue  # theirs are aliases of the model's buffers, which go on between two events
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_warm_up_has_the_name_that_it_was_attached_with():
    _, engine = run(EMAHandler, name="other", momentum=0.1, momentum_warmup=0.5, warmup_iters=20)
    assert engine.state.other == pytest.approx(0.1)
    assert not hasattr(engine.state, "ema_momentum")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"momentum": 0.0}, "Invalid momentum"),
        ({"momentum": 2}, "Invalid"),
        ({"handle_buffers": "swap"}, "only be one"),
    ],
)
def test_wrong_arguments_are_value_errors(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        EMAHandler(network(), **options)
    assert isinstance(caught.value, polyak.PolyakError)


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_lightnings_callback_makes_the_same_checkpoints(tmp_path, name):
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from polyak.compat import lightning as ours

    if not hasattr(averaging, name):
        pytest.skip("this Lightning has no such callback")

    class Regression(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.mse_loss(self.layers(x), y)

        def validation_step(self, batch, _):
            self.log("loss", self.training_step(batch, _))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(1)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, num_workers=0)
    files = []
    for module in (averaging, ours):
        callback = getattr(module, name)(**({"decay": 0.9} if name.startswith("EMA") else {}))
        trainer = Trainer(
            max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path / module.__name__, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Regression(), loader, loader)
        files.append(tmp_path / f"{module.__name__}.ckpt")
        trainer.save_checkpoint(files[-1])
    theirs, mine = (torch.load(file, weights_only=False) for file in files)
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert [*mine[part]] == [*theirs[part]]
        for key, value in theirs[part].items():
            if value.is_floating_point() or key == "n_averaged":
                torch.testing.assert_close(mine[part][key], value, rtol=1e-4, atol=1e-5)
