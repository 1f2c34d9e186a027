"""The command ``polyak``, and ``python -m polyak``."""

from __future__ import annotations

import sys

from polyak.errors import PolyakError

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what is missing for it."""
    try:
        from polyak.cli import app
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in {"rich", "typer"}:
            raise
        sys.exit(_failure(f"the command line needs {missing}: pip install rich typer", 2))
    try:
        app(prog_name="polyak")
    except PolyakError as error:
        sys.exit(_failure(str(error), 2))


def _failure(message: str, code: int) -> int:
    sys.stderr.write(f"polyak: {message}\n")
    return code


if __name__ == "__main__":
    main()
