"""Pickles read without executing them: a machine that builds plain containers and names, and calls nothing."""

from __future__ import annotations

import pickletools
import warnings
from typing import IO, TYPE_CHECKING, Any, cast

from polyak.errors.formatting import shown
from polyak.files.reading.malicious import named
from polyak.files.reading.meanings import Instance, meaning

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyak.files.reading.meanings import Saved
    from polyak.files.reading.streams import Bounded

__all__ = ["interpret"]

_MOST = 20_000_000  # instructions: a hundred thousand tensors with the state of their optimiser
_PLAIN = (str, bytes, int, float, type(None))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip
_NOTHING = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER"})


def interpret(file: Bounded, stored: Callable[[Any], Any], foreign: set[str] | None = None) -> Saved:
    """Return the contents of a pickle: containers, numbers and texts as they are, anything else by name only.

    No class is imported and nothing is called. A name outside of a short list becomes an inert ``Instance``.

    Args:
        file: Where the pickle begins; afterwards the file is behind its end.
        stored: Returns what stands for a persistent id, which names a tensor's memory.
        foreign: Gets the names that became an ``Instance``. Defaults to None.

    Raises:
        StateError: If it names a function that only malicious files name, such as ``os.system``.
        ValueError: If it is damaged.
    """
    machine = _Machine(stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of strange escapes in texts
        for number, (code, value, _) in enumerate(pickletools.genops(cast("IO[bytes]", file))):
            if number > _MOST:
                message = f"its pickle has more than {_MOST} instructions"
                raise ValueError(message)
            _follow(machine, code.name, value)
    if foreign is not None:
        foreign |= machine.foreign
    return machine.stack[-1] if machine.stack else None


def _follow(machine: _Machine, name: str, value: Saved) -> None:
    try:
        machine.step(name, value)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        message = f"its pickle cannot be read: {name} finds {type(error).__name__}"
        raise ValueError(message) from error


class _Machine:
    """A stack, a memo, and the marks that group what lies on the stack."""

    def __init__(self, stored: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._stored = stored
        self.foreign: set[str] = set()

    def step(self, name: str, value: Saved) -> None:
        """Follow one instruction."""
        if name in _VALUES:
            self.stack.append(value)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _NOTHING:
            return
        elif name in {"GET", "BINGET", "LONG_BINGET"}:
            self.stack.append(self._memo[value])
        elif name in {"PUT", "BINPUT", "LONG_BINPUT"}:
            self._memo[value] = self.stack[-1]
        elif (follow := getattr(self, f"_{name.lower()}", None)) is not None:
            follow(value)
        else:
            message = f"its pickle has the instruction {name}, which no checkpoint needs"
            raise ValueError(message)

    def _marked(self) -> list[Any]:
        begin = self._marks.pop()
        found = self.stack[begin:]
        del self.stack[begin:]
        return found

    def _mark(self, _: object) -> None:
        self._marks.append(len(self.stack))

    def _pop(self, _: object) -> None:
        if self._marks and self._marks[-1] == len(self.stack):
            self._marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self, _: object) -> None:
        self._marked()

    def _dup(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _empty_list(self, _: object) -> None:
        self.stack.append([])

    def _empty_tuple(self, _: object) -> None:
        self.stack.append(())

    def _empty_dict(self, _: object) -> None:
        self.stack.append({})

    def _empty_set(self, _: object) -> None:
        self.stack.append([])  # of what a set holds nothing is needed

    def _list(self, _: object) -> None:
        self.stack.append(self._marked())

    def _tuple(self, _: object) -> None:
        self.stack.append(tuple(self._marked()))

    _frozenset = _tuple

    def _tuple1(self, _: object) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: object) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: object) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _dict(self, _: object) -> None:
        values = self._marked()
        self.stack.append({})
        self._fill(self.stack[-1], values)

    def _append(self, _: object) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _appends(self, _: object) -> None:
        values = self._marked()
        self._extend(self.stack[-1], values)

    _additems = _appends

    def _setitem(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self.stack[-1], [key, value])

    def _setitems(self, _: object) -> None:
        values = self._marked()
        self._fill(self.stack[-1], values)

    def _global(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self.stack.append(named(module, name))

    def _stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            message = f"its pickle names {shown(module)} and {shown(name)} as a function"
            raise ValueError(message)
        self.stack.append(named(module, name))

    def _reduce(self, _: object) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        self._make(called, args)

    _newobj = _reduce

    def _newobj_ex(self, _: object) -> None:
        self.stack.pop()  # arguments by name
        self._reduce(None)

    def _inst(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self._make(named(module, name), tuple(self._marked()))

    def _obj(self, _: object) -> None:
        called, *args = self._marked()
        self._make(called, tuple(args))

    def _make(self, called: Saved, args: Saved) -> None:
        made = meaning(called, args)
        if isinstance(made, Instance):
            self.foreign.add(str(made.of))
        self.stack.append(made)

    def _build(self, _: object) -> None:
        state = self.stack.pop()
        if isinstance(made := self.stack[-1], Instance):
            made.state = state

    def _persid(self, value: str) -> None:
        self.stack.append(self._stored(value))

    def _binpersid(self, _: object) -> None:
        self.stack.append(self._stored(self.stack.pop()))

    @staticmethod
    def _extend(target: Saved, values: list[Any]) -> None:
        if isinstance(target, list):
            target += values
        elif isinstance(target, Instance):
            target.items += values
        else:
            message = f"its pickle appends to {shown(type(target).__name__)}"
            raise ValueError(message)  # noqa: TRY004 - a damaged file

    @staticmethod
    def _fill(target: Saved, values: list[Any]) -> None:
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        elif isinstance(target, Instance):
            target.items += pairs
        else:
            message = f"its pickle sets items of {shown(type(target).__name__)}"
            raise ValueError(message)  # noqa: TRY004 - a damaged file


def _key(value: Saved) -> Saved:
    """Return a key; what is no plain value is named by its identity, since hashing it may nest without end."""
    flat = type(value) is tuple and all(isinstance(part, _PLAIN) for part in value)
    return value if flat or isinstance(value, (*_PLAIN, Instance)) else f"<{type(value).__name__} {id(value)}>"
