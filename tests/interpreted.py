"""Checks of what runs on a GPU, each a function of a device: without one they run on the CPU, in Triton's interpreter.

Triton looks for its interpreter when it is imported, so a child process runs all checks of a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback

import numpy as np
import torch


class Checks(dict):
    """The checks of a script, by name."""

    def collect(self, *cases):
        """Collect a check, once for each case of further arguments."""

        def add(check):
            for case in cases or [()]:
                names = [str(value).removeprefix("torch.") for value in case]
                self["-".join([check.__name__, *names])] = lambda on, case=case: check(on, *case)
            return check

        return add

    def run(self):
        """Run all on the CPU, and print what each raised."""
        torch.set_num_threads(1)
        results = {}
        # NumPy, which interprets, would warn of what a GPU rounds to infinity.
        with np.errstate(over="ignore", invalid="ignore"):
            for name, check in self.items():
                try:
                    check("cpu")
                    results[name] = ""
                except Exception:  # noqa: BLE001 - whatever went wrong is the result
                    results[name] = traceback.format_exc()
        print(json.dumps(results))  # noqa: T201 - the parent reads it


def results_of(script):
    """Run the checks of a script in the interpreter; return the traceback of each, or an empty text."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    command = [sys.executable, "-W", "error", script]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)
