"""One process at a time in a folder, however the last one ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adarankgrad.train.errors import UserError

LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and keep every other process that asks for its lock out of it meanwhile.

    The kernel holds the lock and lets go of it however the process ends. On leaving, the lock's
    file is removed, and so is the folder if it was made here and is empty. Systems without
    ``flock`` have no such lock.

    Args:
        folder: The folder of a run or a comparison.

    Raises:
        UserError: Another process is in it, or it cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: name a folder.")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    try:
        handle = _acquire(path)
    except OSError as error:
        raise UserError(
            f"output {folder} cannot be written: name a folder you may write to."
        ) from error
    try:
        yield
    finally:
        # The file goes while it is locked, or another process's lock could be taken with it.
        path.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            for made in missing:
                made.rmdir()


def _acquire(path: Path) -> int:
    """Open the lock's file and lock it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path)
            if _is_at(handle, path):
                os.truncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last owner has just removed it


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(handle, 20).decode().strip()
        raise UserError(
            f"output {path.parent} is in use by another process{f' ({owner})' if owner else ''}: "
            "wait for it, or name another folder."
        ) from error
    except OSError:
        pass  # a file system without locks


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
