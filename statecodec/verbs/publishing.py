"""A restored file or directory is made beside its destination and gets its name once it is whole and on the disk.

It is made in a folder `.NAME.<16 hex digits>.tmp`, locked (flock) for as long as its writer lives, so that the next
restore to the same destination removes what a killed one left, and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from statecodec.checkpoint.chain import refuse_base
from statecodec.errors import OutputExists, UsageError
from statecodec.format.output import give_name, os_errors

_NAME = 50  # characters of the destination's name in the folder's: a file name has at most 255 bytes


def publish(target: Path, write: Callable[[Path], None], *, directory: bool, force: bool) -> None:
    """Let `write` make a file (or fill a directory), then give it the name `target`.

    With `force` a file replaces a file and a directory a directory, never one the other, nor a device. Raises
    UsageError, OutputExists, OutputFailed, and what `write` raises.
    """
    check(target, directory=directory, force=force)
    target = Path(os.path.realpath(target))
    with os_errors(target):
        _sweep(target)
        holder, lock = _holder(target)
        try:
            made = holder / "made"
            if directory:
                made.mkdir()
            write(made)
            _sync_directories(made)
            if directory:
                _name_directory(made, target, holder / "replaced", force)
            else:
                give_name(made, target, force)
            _sync(target.parent)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
            os.close(lock)


def check(target: Path, *, directory: bool, force: bool) -> None:
    """Raise UsageError or OutputExists if the destination is there and will not be replaced."""
    if not os.path.lexists(target):
        return
    if target.exists() and not (target.is_dir() if directory else target.is_file()):
        kind = "directory" if directory else "regular file"
        raise UsageError(f"{target} exists and is not a {kind}; it is not replaced by one")
    if not force:
        raise OutputExists(f"{target} exists; use force to replace it")
    refuse_base(target)


def _name_directory(made: Path, target: Path, replaced: Path, force: bool) -> None:
    if not os.path.lexists(target):
        os.rename(made, target)
        return
    if not force:
        raise OutputExists(f"{target} was created meanwhile; use force to replace it")
    os.rename(target, replaced)
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(replaced, target)
        raise


def _holder(target: Path) -> tuple[Path, int]:
    """A new folder beside the target, and the descriptor that locks it."""
    while True:
        path = target.with_name(f".{target.name[:_NAME]}.{secrets.token_hex(8)}.tmp")
        os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can sweep either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if path.is_dir():
            return path, fd
        os.close(fd)  # a sweep took it between mkdir and flock


def _sweep(target: Path) -> None:
    """Remove the folders that dead writers of this destination left."""
    pattern = re.compile(rf"\.{re.escape(target.name[:_NAME])}\.[0-9a-f]{{16}}\.tmp")
    for name in os.listdir(target.parent):
        if pattern.fullmatch(name):
            # Not ours to open, locked by a living writer, or no folder: leave it.
            with contextlib.suppress(OSError):
                fd = os.open(target.with_name(name), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(target.with_name(name))
                finally:
                    os.close(fd)


def _sync_directories(path: Path) -> None:
    """Make directory entries durable; the files themselves already are."""
    for root, _, _ in os.walk(path):
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
