"""One process at a time in the folder of a run."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not POSIX: nothing is locked there
    fcntl = None

NAME = "lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, the folder is this process's alone. A process that dies leaves its claim behind, and nobody heeds it.

    Raises:
        BlockingIOError: when another process has it, naming that process, its host, and since when.
    """
    file = _locked(folder)
    try:
        _sign(file, folder / NAME)
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)
        with suppress(OSError):  # what a full disk left unwritten
            file.close()


def refuse_held(folder: Path) -> None:
    """Raises what :func:`claimed` does when another process has the folder; changes nothing."""
    if (folder / NAME).is_file() and not (folder / NAME).is_symlink():
        _locked(folder).close()


def _sign(file: IO[str], path: Path) -> None:
    """Writes whose lock it is."""
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    try:
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}))
        file.flush()
    except OSError as error:  # that of write() names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _locked(folder: Path) -> IO[str]:
    """The lock of a folder, open and held."""
    while True:
        file = _opened(folder / NAME)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == (folder / NAME).lstat().st_ino:
                return file
        except BlockingIOError:
            file.seek(0)
            said = file.read(1000)
            file.close()
            raise BlockingIOError(f"{str(folder)!r} is in use{_by(said)}. Choose another folder, or wait.") from None
        except FileNotFoundError:  # whoever had it let go of it just now
            pass
        file.close()


def _opened(file: Path) -> IO[str]:
    """A lock, to be read and written; never what a link in its place leads to."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")


def _by(said: str) -> str:
    try:
        about = json.loads(said)
        return f" by process {about['process']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
