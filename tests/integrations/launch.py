"""Scripts on several ranks, started as users start them: by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANKS = Path(__file__).with_name("ranks")


def torchrun(script, *args, ranks=2):
    """Run a script of the folder ranks on so many processes; it fails where one of them does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = [str(RANKS.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    made = subprocess.run(
        [*command, str(RANKS / script), *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-6000:]
