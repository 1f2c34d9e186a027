"""What can go wrong, one class per cause; each is also the builtin that it is.

Every message says what was got, what was expected and what to do. Nothing has been written
when one of these is raised: the average has the bits that it had before the call.
"""

from __future__ import annotations

__all__ = [
    "AppliedError",
    "ArgumentError",
    "AttributeAccessError",
    "ConfigError",
    "DistributedError",
    "FrozenError",
    "MismatchError",
    "MissingExtraError",
    "MissingFileError",
    "ModelError",
    "NonFiniteError",
    "PluginError",
    "PolyakError",
    "PolyakWarning",
    "RateError",
    "SnapshotError",
    "StateError",
    "UnboundError",
    "UnknownAverageError",
    "UnknownMergeError",
    "UnknownStrategyError",
    "WriteError",
]


class PolyakError(Exception):
    """The base of every error that polyak raises on purpose."""

    # KeyError shows its message in quotes; every child shows it as written.
    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(PolyakError, ValueError):
    """A setting, an option or a config file that cannot be used."""


class ArgumentError(ConfigError, TypeError):
    """An argument of another kind than the call takes: swapped, by position, or no strategy."""


class AttributeAccessError(PolyakError, AttributeError):
    """An attribute that an averager or a config does not have, or does not let you set."""


class FrozenError(ConfigError, AttributeAccessError):
    """An assignment to a setting; settings are frozen, and another object has other settings."""


class UnknownAverageError(PolyakError, KeyError):
    """A name that a bank has no average for."""


class UnknownStrategyError(ConfigError, KeyError):
    """A strategy name that no plugin offers, or that two plugins offer."""


class UnknownMergeError(ConfigError, KeyError):
    """A merge name that no plugin offers, or that two plugins offer."""


class PluginError(PolyakError, RuntimeError):
    """A plugin that failed to load or offers something other than strategies and merges."""


class MissingExtraError(PolyakError, ImportError):
    """A part of polyak that needs a package which is not installed; the message names the extra that brings it."""


class ModelError(PolyakError, ValueError):
    """A model that cannot be averaged: no tensors, uninitialised, meta or sparse ones."""


class MismatchError(PolyakError, ValueError):
    """A model whose tensors are not those the average was built from."""


class RateError(PolyakError, ValueError):
    """A strategy returned a rate that is not a finite number in [0, 1], or could not return one."""


class NonFiniteError(PolyakError, ArithmeticError):
    """Weights with NaN or infinities, under ``nonfinite="raise"``."""


class AppliedError(PolyakError, RuntimeError):
    """The call needs the model's own weights, and it holds the average now."""


class UnboundError(PolyakError, RuntimeError):
    """The call needs a model, and the averager has none (it was unpickled, or its model is gone)."""


class DistributedError(PolyakError, RuntimeError):
    """Ranks that disagree about an average, or one that did not answer."""


class StateError(PolyakError, ValueError):
    """A state that belongs to another model, strategy or version of the format, or is incomplete."""


class MissingFileError(StateError, ConfigError, FileNotFoundError):
    """A file or folder to read that is not there: a first start, or a wrong path."""


class WriteError(PolyakError, OSError):
    """A file that could not be written, as on a full disk; what had its name before is unchanged."""


class SnapshotError(WriteError):
    """A snapshot that could not be written; the average is whole, and training can go on."""


class PolyakWarning(UserWarning):
    """Something that is allowed and probably not meant."""
