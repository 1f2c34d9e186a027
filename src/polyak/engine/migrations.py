"""States of earlier formats, brought to the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["upgraded"]

_COLUMNS = ("rates", "strides", "last", "lrs", "counted")


def upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state in the present format. What is damaged stays so, for the schema to refuse."""
    state = dict(state)
    if state["format"] == 1 and "history" in state:
        state |= {"format": 2, "history": _named(state["history"])}
    return state


def _named(history: Any) -> Any:  # noqa: ANN401 - whatever there is
    """Return the history of format 1 by names.

    Its first files had a mapping; later ones the columns in order, the changed settings and the identity between them.
    """
    if isinstance(history, Mapping):
        return (history,)
    if not isinstance(history, (list, tuple)):
        return history
    named: dict[str, Any] = {}
    columns = [part for part in history if isinstance(part, Tensor)]
    if len(columns) > len(_COLUMNS):
        return history
    for part in history:
        if isinstance(part, Mapping):
            named["identity"] = part
        elif not isinstance(part, Tensor):
            named["changes"] = [*named.get("changes", []), *part] if isinstance(part, (list, tuple)) else part
    return ({**dict(zip(_COLUMNS, columns, strict=False)), **named},)
