"""Files that appear whole or not at all."""

import itertools
import os
import shutil
import socket
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

if sys.platform != "win32":
    import fcntl

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_numbers = itertools.count()


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A hidden place beside ``path`` to write a file or folder to before it is moved there; removed at the end.

    Each process and thread that writes to a path has its own place, named after it, so that the next write to that path
    can remove what a killed process left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir():
        if _is_abandoned(left, path):
            _remove(left)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{next(_numbers)}.new")
    try:
        yield temporary
    finally:
        _remove(temporary)


def _is_abandoned(left: Path, path: Path) -> bool:
    """Whether ``left`` was written for ``path`` by a process of this machine that has ended."""
    start, end = f".{path.name}.{_HOST}-", ".new"
    process = left.name.removeprefix(start).removesuffix(end).split("-")[0]
    if not (left.name.startswith(start) and left.name.endswith(end) and process.isdecimal()):
        return False
    try:
        # A process that began later has only the same number.
        return psutil.Process(int(process)).create_time() > left.stat().st_mtime
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it replaces ``path`` when the block ends without an error."""
    path = Path(path)
    with unfinished(path) as temporary:
        yield temporary
        allow_default_mode(temporary)
        os.replace(temporary, path)


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def check_writable(path: Path, option: str) -> None:
    """Before the work, see that a file or a folder can be written at the path that an option was given.

    Raises:
        OSError: it cannot.
    """
    above = path.parent if path.is_file() else path
    while not above.exists():
        above = above.parent
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder that no other process or thread can hold, where the file system supports locks."""
    descriptor = None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)
    try:
        if sys.platform != "win32" and descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def allow_default_mode(path: Path) -> None:
    """Give a file that a library wrote with private permissions the mode that a plain ``open`` gives."""
    with unfinished(path) as plain:
        plain.touch()
        path.chmod(stat.S_IMODE(plain.stat().st_mode))
