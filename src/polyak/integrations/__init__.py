"""One line into the trainers of other libraries: Lightning, transformers, Accelerate, Ignite.

Each module imports its framework, so import the one that you use: ``polyak.integrations.lightning``.
"""
