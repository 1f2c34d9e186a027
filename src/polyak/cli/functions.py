"""Functions of the user's, named on the command line as ``MODULE:FUNCTION``."""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import typer

from polyak.errors import ConfigError, PolyakError
from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["function_called"]


def function_called(name: str) -> Callable[[Any], float]:
    """Return a function by its name, whose failures are told in a line.

    Raises:
        ConfigError: If it cannot be imported, or is no function.
    """
    from polyak.bench.models import imported

    module, _, function = name.partition(":")
    if not (module and function) or module.startswith("."):
        message = f"got {name!r}; expected MODULE:FUNCTION, as in evaluation:test_loss for a function in evaluation.py"
        raise ConfigError(message)
    try:
        found = imported(name)
    except (SystemExit, typer.Exit) as error:
        message = f"{name!r} cannot be imported: its module ends the process; guard that by if __name__ == '__main__'"
        raise ConfigError(message) from error
    except (AttributeError, ModuleNotFoundError) as error:
        no_module = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        no_function = isinstance(error, AttributeError) and module in sys.modules
        if not (no_module or no_function):
            raise  # what goes wrong inside the module is told by its own traceback
        message = f"{name!r} cannot be imported ({error}); expected a function in a module, here or installed"
        raise ConfigError(message) from error
    if not callable(found):
        message = f"{name!r} is {shown(found)}; expected a function that takes a state dict and returns a number"
        raise ConfigError(message)

    @wraps(found)
    def called(state: Any) -> float:  # noqa: ANN401 - a state dict
        try:
            value: float = found(state)
        except typer.Exit as error:  # which would end the command as if it had succeeded
            message = f"{name} ended the command with the exit code {error.exit_code}; expected a number"
            raise ConfigError(message) from error
        except PolyakError:
            raise
        except Exception as error:
            frames = [frame for frame in extract_tb(error.__traceback__) if frame.filename != __file__]
            own = [frame for frame in frames if frame.filename == getattr(sys.modules[module], "__file__", "")]
            # Without a frame the call itself failed: the function takes other arguments.
            places = [f" ({Path(frame.filename).name}:{frame.lineno})" for frame in (own or frames)[-1:]]
            message = f"{name} raised {type(error).__name__}: {error}{''.join(places)}"
            raise ConfigError(message) from error
        return value

    return called
