"""With this folder on PYTHONPATH no process can import Numba, as where it is not installed."""

import sys

sys.modules["numba"] = None
