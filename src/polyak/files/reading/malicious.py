"""Names that only malicious pickles ask for. Nothing is ever called; the user is warned all the same."""

from __future__ import annotations

from polyak.errors import StateError
from polyak.files.reading.meanings import Global

__all__ = ["named"]

_HARMLESS = frozenset(
    {"set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "bytearray", "complex",
     "object", "slice", "range", "unicode", "long", "type", "NoneType", "Ellipsis", "NotImplemented"}
)  # fmt: skip
"""Builtins that make plain values; all others refuse the file."""
_MALICIOUS = frozenset(
    {"os", "posix", "nt", "posixpath", "ntpath", "subprocess", "_posixsubprocess", "sys", "shutil", "socket", "_socket",
     "runpy", "importlib", "pty", "ctypes", "_ctypes", "codeop", "webbrowser", "operator", "_operator", "marshal",
     "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "timeit", "bdb", "pdb", "pydoc",
     "cProfile", "platform", "urllib", "urllib2", "http", "httplib", "requests", "ftplib", "smtplib", "telnetlib",
     "asyncio", "multiprocessing", "concurrent", "threading", "_thread", "signal", "inspect", "gc", "atexit", "fcntl",
     "glob", "venv", "ensurepip", "pip", "setuptools", "distutils", "doctest", "unittest", "linecache", "zipimport",
     "pkgutil", "sqlite3", "xmlrpc", "ssl", "getpass", "cgi", "idlelib", "lib2to3", "tkinter"}
)  # fmt: skip
_ALONE = frozenset({"code", "commands", "imp", "profile", "site", "tempfile", "trace"})
"""Modules of Python whose names users give to packages of their own."""
_SOME = {
    "builtins": _HARMLESS,
    "__builtin__": _HARMLESS,
    "pathlib": frozenset({"PosixPath", "WindowsPath", "Path", "PurePath", "PurePosixPath", "PureWindowsPath"}),
    "types": frozenset({"SimpleNamespace", "MappingProxyType"}),
    "io": frozenset({"BytesIO", "StringIO"}),
    "_io": frozenset({"BytesIO", "StringIO"}),
}
"""Modules of which only these names are harmless."""
_LOADERS = frozenset(
    {"torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension", "torch.utils.bottleneck",
     "torch.utils.collect_env", "torch.distributed.run", "torch.distributed.launch", "numpy.testing", "numpy.f2py",
     "numpy.distutils", "numpy.lib.npyio"}
)  # fmt: skip
_CALLS_ANYTHING = frozenset(
    {"torch.load", "torch.serialization.load", "torch.compile", "numpy.load", "functools.reduce"}
)


def named(module: str, name: str) -> Global:
    """Return a name that a pickle asks for.

    Raises:
        StateError: If only malicious files ask for it.
    """
    found = Global(module, name)
    if _is_malicious(found):
        message = (
            f"it asks to call {module}.{name} when it is unpickled, which can run any program. Nothing was executed: "
            "polyak only reads. Do not load this file elsewhere; ask its author for a .safetensors file"
        )
        raise StateError(message)
    return found


def _is_malicious(named: Global) -> bool:
    root = named.module.partition(".")[0]
    if root in _SOME:
        return named.name not in _SOME[root]
    inside = any(named.module == module or named.module.startswith(f"{module}.") for module in _LOADERS)
    return root in _MALICIOUS or named.module in _ALONE or inside or str(named) in _CALLS_ANYTHING
