"""One writer a folder: a lock that the kernel takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from triewise.errors import UserError
from triewise.files import TEMPORARY, short, sweep
from triewise.progress import is_first_process

LOCK = ".lock"
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have no locks
_held: dict[Path, int] = {}  # lock files of this process and their descriptors


class Busy(UserError):
    """Another process writes there."""


@contextlib.contextmanager
def one_writer(folder: Path, beside: bool = False, wait: bool = False) -> Iterator[None]:
    """Let one process write in a folder at a time; what killed ones left there is removed first.

    A process may enter again what it holds. Of several processes of one run the first one holds the lock for all. A
    folder that had to be made and stays empty is removed again.

    Args:
        folder: What is written in.
        beside: The folder is replaced as a whole, so its lock is a file beside it.
        wait: Whether to wait for another process, for what takes a moment.

    Raises:
        Busy: Another process writes there.
        UserError: This one may not.
        OSError: This one may not, and would wait.
    """
    folder = Path(os.path.realpath(folder))
    file = folder.with_name(f".{short(folder.name)}{LOCK}") if beside else folder / LOCK
    if not is_first_process() or file in _held:
        yield
        return
    made = [place for place in (file.parent, *file.parent.parents) if not place.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _held[file] = _taken(file, folder, wait)
    except OSError as error:
        if wait:  # of a cache, whose line names TRIEWISE_CACHE
            raise
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    try:
        sweep(file.parent, folder.name if beside else None)
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(_held.pop(file))
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def strangers(folder: Path) -> list[str]:
    """Names in a folder, sorted, but for a lock and what killed processes left."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in names if name != LOCK and not name.startswith(TEMPORARY))


def _taken(file: Path, folder: Path, wait: bool) -> int:
    """A descriptor of the lock file that holds the lock."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, wait)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                who = os.read(descriptor, 20).decode("ascii", "replace") or "unknown"
                os.close(descriptor)
                raise Busy(
                    f"another triewise process (pid {who}) writes in {folder}; wait for it, or choose another --out"
                ) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
            with contextlib.suppress(OSError):  # on a full disk nobody learns the number
                os.truncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # who held it till now has removed the file


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, wait: bool) -> None:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a byte that nobody has to read
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def _forget() -> None:
        """In a forked process: it does not write, and must not hold the lock when this one was killed."""
        while _held:
            os.close(_held.popitem()[1])

    os.register_at_fork(after_in_child=_forget)
