"""A pytest plugin that runs other libraries' own tests against polyak.compat; see CONTRIBUTING.

It puts each stand-in in the place of the class, wherever the library shows it, before the tests import it. The run
fails if no average came from polyak's engine.
"""

from __future__ import annotations

import importlib
import importlib.util

from polyak.compat import STAND_INS
from polyak.engine.updates import Updater
from polyak.errors import MissingExtraError

PACKAGES = {
    "torch": ["torch.optim.swa_utils"],
    "timm": ["timm.utils", "timm.utils.model_ema", "timm.utils.model", "timm.task.task"],
    "torch_ema": ["torch_ema", "torch_ema.ema"],
    "diffusers": ["diffusers.training_utils"],
    "ema_pytorch": ["ema_pytorch", "ema_pytorch.ema_pytorch"],
    "ignite": ["ignite.handlers", "ignite.handlers.ema_handler"],
    "lightning": ["lightning.pytorch.callbacks", "lightning.pytorch.callbacks.weight_averaging"],
}
_updates = [0]


def pytest_configure(config):
    original = Updater.update

    def counted(self, *arguments):
        _updates[0] += 1
        original(self, *arguments)

    Updater.update = counted
    replaced = [name for one in STAND_INS for name in _replaced(one)]
    config.stash["polyak"] = replaced


def pytest_report_header(config):
    return f"polyak stands in for: {', '.join(config.stash['polyak'])}"


def pytest_sessionfinish(session):
    if session.testscollected and not _updates[0]:
        session.exitstatus = 1
        session.config.get_terminal_writer().line("no average came from polyak's engine")


def _replaced(stand_in):
    """Put one stand-in in the place of the class; return where."""
    if importlib.util.find_spec(PACKAGES[stand_in.module][0].partition(".")[0]) is None:
        return
    try:
        ours = importlib.import_module(f"polyak.compat.{stand_in.module}")
    except MissingExtraError:  # not installed, or older
        return
    for name in PACKAGES[stand_in.module]:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for cls in stand_in.names:
            if hasattr(module, cls):
                setattr(module, cls, getattr(ours, cls))
                yield f"{name}.{cls}"
