"""The parts of ``examples/choose_later.py``: a text that every Python installation carries, and what learns it."""
