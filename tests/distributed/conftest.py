"""Which of these tests can run here."""

from __future__ import annotations

import torch

# The FSDP2 of torch 2.6 does not train on CPUs: its own forward and backward raise.
needs_fsdp2 = ["test_budgets.py", "test_checkpoints.py", "test_dying.py", "test_sharded.py"]
collect_ignore = [] if hasattr(torch.cpu.Stream, "record_event") else needs_fsdp2
