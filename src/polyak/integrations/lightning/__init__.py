"""The average in Lightning's Trainer: validation sees it, checkpoints hold it, and resuming is exact."""

from polyak.errors.extras import require

require("polyak.integrations.lightning", "lightning", "2.4", "lightning")

from polyak.integrations.lightning.callback import AveragingCallback  # noqa: E402 - not before it is known to be there

__all__ = ["AveragingCallback"]
