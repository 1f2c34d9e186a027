"""The average in the Hugging Face Trainer: evaluations see it, checkpoints hold it, and resuming is exact."""

from polyak.errors.extras import require

require("polyak.integrations.transformers", "transformers", "4.56", "transformers")

from polyak.integrations.transformers.callback import AveragingCallback  # noqa: E402 - not before it is known to be there
from polyak.integrations.transformers.trainer import AveragingMixin, average_trainer  # noqa: E402 - not before it is known to be there

__all__ = ["AveragingCallback", "AveragingMixin", "average_trainer"]
