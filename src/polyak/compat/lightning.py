"""Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` over polyak's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from polyak.compat.torch import AveragedModel
from polyak.errors.extras import require

require("polyak.compat.lightning", "lightning", "2.6", "lightning")

from lightning.pytorch.callbacks import weight_averaging as theirs  # noqa: E402 - not before it is known to be there

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["EMAWeightAveraging", "WeightAveraging"]


class WeightAveraging(theirs.WeightAveraging):
    """Lightning's ``WeightAveraging`` with an average that polyak's engine moves.

    All hooks, arguments and checkpoints are Lightning's; override ``should_update``, ``_swap_models`` and
    ``_copy_average_to_current`` as there.

    Matches: Lightning 2.6.5 to rounding. Differs: NaN is held, other models are refused, tied weights move once.

    Often confused with: ``polyak.integrations.lightning.AveragingCallback``, which takes any strategy, and shards.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average when fit begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            device = self._device or pl_module.device
            made = AveragedModel(pl_module, device=device, use_buffers=self._use_buffers, **self._kwargs)
            self._average_model: AveragedModel | None = made


class EMAWeightAveraging(WeightAveraging, theirs.EMAWeightAveraging):
    """Lightning's ``EMAWeightAveraging`` with an average that polyak's engine moves; see ``WeightAveraging``."""
