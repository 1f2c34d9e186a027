"""Which of these tests can run here."""

from __future__ import annotations

from on_ranks.start import FSDP2_TRAINS

needs_fsdp2 = ["test_budgets.py", "test_checkpoints.py", "test_dying.py", "test_sharded.py"]
collect_ignore = [] if FSDP2_TRAINS else needs_fsdp2
