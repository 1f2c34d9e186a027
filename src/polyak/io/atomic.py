"""Files that are written whole or not at all, and read only if they are regular files."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from polyak.errors import ArgumentError, PolyakError, WriteError
from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

try:
    import fcntl
except ImportError:  # Windows has no such locks: stale folders stay there
    fcntl = None  # type: ignore[assignment]  # it stands for a module

__all__ = ["as_path", "check_target", "exclusive", "open_regular", "remove_stale", "scratch_folder", "write_whole"]

_SCRATCH = ".polyak-"
_LOCK = ".lock"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Fill a scratch file in a folder next to ``file``, then rename it; after an exception nothing is left.

    Args:
        file: The file to write or replace.
        write: Fills the file whose path it gets.

    Raises:
        WriteError: If the file cannot be written, as on a full disk, or if its path belongs to no regular file.
    """
    try:
        check_target(file)
        with scratch_folder(file.parent) as folder:
            scratch = folder / file.name
            scratch.touch()
            mode = scratch.stat().st_mode
            write(scratch)
            scratch.chmod(mode)  # some writers make files that no one else may read
            with scratch.open("rb+") as written:
                os.fsync(written.fileno())  # else a crash of the machine may leave the new name on an empty file
            scratch.replace(file)
    except PolyakError:
        raise
    except Exception as error:  # each format reports a full disk by an error of its own
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        cure = "Make room, or give" if getattr(error, "errno", None) in _FULL else "Give"
        message = f"the file {str(file)!r} cannot be written: {reason}. {cure} another path."
        problem = WriteError(message)
        problem.errno = getattr(error, "errno", None)
        raise problem from error


def as_path(path: object, what: str) -> Path:
    """Return a path.

    Args:
        path: What was given as one.
        what: What to call it.

    Raises:
        ArgumentError: If it is not a text and no path.
    """
    if isinstance(path, (str, os.PathLike)):
        with suppress(TypeError):  # a path of bytes
            return Path(path)
    message = f"{what} is given as a path, a text such as 'runs/first'; got {shown(path)}"
    raise ArgumentError(message)


def check_target(file: Path) -> None:
    """Refuse a path that belongs to something other than a regular file.

    Raises:
        WriteError: If it does.
    """
    with suppress(FileNotFoundError):
        if kind := _other_kind(file.stat()):
            message = f"the file {str(file)!r} cannot be written: the path belongs to {kind}. Give another path."
            raise WriteError(message)
    if not file.absolute().parent.is_dir():
        message = f"the file {str(file)!r} cannot be written: there is no folder {str(file.parent)!r}; make it first"
        problem = WriteError(message)
        problem.errno = errno.ENOENT
        raise problem


def open_regular(file: Path, buffering: int = -1) -> IO[bytes]:
    """Open a regular file for reading; what may block for ever, such as a FIFO or a device, is refused.

    Raises:
        OSError: If it is missing, unreadable or no regular file.
    """
    return open(file, "rb", buffering, opener=_opened)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make an empty folder in ``parent`` for the time of the context; folders of dead processes are removed."""
    remove_stale(parent)
    claimed: list[Path] = []  # a folder is named before it is made: Ctrl-C may come as soon as it is there
    lock = None
    try:
        try:
            lock = _claimed(parent, claimed)
            yield claimed[-1]
        finally:
            _clear(claimed)
    finally:  # where Ctrl-C interrupted the removal
        _clear(claimed)
        _unlock(claimed, lock)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of the same context for this folder; best effort."""
    opened = None
    try:
        if fcntl is not None:
            with suppress(OSError):  # a disk without locks of folders
                opened = os.open(folder, os.O_RDONLY)
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        if opened is not None:
            with suppress(OSError):
                fcntl.flock(opened, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open, too
            os.close(opened)


def lock_for_process(opened: int) -> bool:
    """Lock an open file against other processes until it is closed; return False where one holds it. Best effort."""
    if fcntl is not None:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a disk without locks
            return True
    return True


def remove_stale(parent: Path) -> None:
    """Remove the scratch folders whose writers are gone; best effort."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # another one is removing it, it is another user's, or its disk has no locks
            if (folder / _LOCK).exists() or not any(folder.iterdir()):  # else it is somebody's own
                lock = _locked(folder)
                _clear([folder])
                _unlock([folder], lock)


def _claimed(parent: Path, claimed: list[Path]) -> int | None:
    """Make a folder and return its lock, which ends with the process, however that ends.

    Args:
        parent: Where the folder is made.
        claimed: Gets the folder's path; earlier ones were taken by other processes.
    """
    while True:
        claimed.append(parent / f"{_SCRATCH}{secrets.token_hex(8)}")
        try:
            claimed[-1].mkdir(mode=0o700)
        except FileExistsError:
            claimed.pop()
            continue
        if fcntl is None:
            return None
        try:
            return _locked(claimed[-1])
        except (FileNotFoundError, BlockingIOError):
            continue  # another process took it for a stale one before it was locked
        except OSError:
            if not claimed[-1].is_dir():
                raise
            return None  # a disk without locks, where no folder is ever taken for stale


def _locked(folder: Path) -> int:
    """Return a file that holds the lock of a scratch folder.

    Raises:
        OSError: If another process holds it, or the folder is gone.
    """
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / _LOCK).stat()  # another process may have removed it before it was locked
    except BaseException:
        os.close(lock)
        raise
    return lock


def _clear(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _unlock(folders: Sequence[Path], lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
        for folder in folders:
            with suppress(OSError):  # a network disk keeps an open file, and so the folder, until now
                folder.rmdir()


def _opened(path: str, flags: int) -> int:
    _check_regular(os.stat(path))  # noqa: PTH116 - to open some devices is to use them
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(os.fstat(opened))
    except BaseException:
        os.close(opened)
        raise
    return opened


def _check_regular(about: os.stat_result) -> None:
    if kind := _other_kind(about):
        message = f"it is {kind}, and no regular file"
        raise OSError(message)


def _other_kind(about: os.stat_result) -> str:
    return "" if stat.S_ISREG(about.st_mode) else _KINDS.get(stat.S_IFMT(about.st_mode), "no regular file")
