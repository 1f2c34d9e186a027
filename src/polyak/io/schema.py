"""What all schemas of files are written in: types, ranges, and words for messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from polyak.errors import StateError
from polyak.errors.formatting import brief, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGEST", "Count", "Moment", "Schema", "Settings", "checked", "held", "plain"]

LARGEST = 2**63 - 1
_SHOWN = 6
_WIDTH = 200
_NODES = 10_000  # in settings, which are traversed


def plain(value: Any) -> Any:  # noqa: ANN401 - a validator takes whatever there is
    """Return settings of plain types; deep, cyclic and exploding ones are refused.

    Raises:
        ValueError: If they are not plain, or too many.
    """
    found = [value]
    for seen, one in enumerate(found):
        if seen >= _NODES:
            message = "these are more values than settings have"
            raise ValueError(message)
        if isinstance(one, Mapping):
            if not all(type(key) is str for key in one):
                message = "a setting has a name that is no text"
                raise ValueError(message)
            found += one.values()
        elif isinstance(one, (list, tuple)):
            found += one
        elif not (one is None or type(one) in {bool, int, float, str}):
            message = f"{shown(one)} is no plain value"
            raise ValueError(message)
    return value


def held(tensor: Tensor) -> bool:
    """Return whether each value of a tensor is in memory: no stride of 0 makes many of one."""
    dense = tensor.layout is torch.strided and not tensor.is_meta
    return dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


Count = Annotated[int, Field(ge=0, le=LARGEST)]
Moment = Annotated[int, Field(ge=-1, le=LARGEST)]
Settings = Annotated[Mapping[str, Any], BeforeValidator(plain)]


class Schema(BaseModel):
    """A table in a file; unknown keys belong to a later version."""

    model_config = ConfigDict(strict=True, frozen=True, arbitrary_types_allowed=True)


_S = TypeVar("_S", bound=Schema)


def checked(schema: type[_S], raw: dict[str, Any], what: str, advice: str) -> _S:
    """Return the table in a file.

    Args:
        schema: What it has to be.
        raw: The table.
        what: What to call it.
        advice: What to do if it is damaged.

    Raises:
        StateError: If it is damaged or incomplete.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [f"{'.'.join(map(str, one['loc']))[:_WIDTH]}: {one['msg']}" for one in problems[:_SHOWN]]
        problem = "; ".join(lines)
    except (TypeError, RuntimeError) as error:  # of tensors that are none of ours
        problem = f"{type(error).__name__}: {error}"
    message = f"{what} is damaged or incomplete: {problem}. {advice}"
    raise StateError(brief(message))
