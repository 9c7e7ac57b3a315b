"""Landlock (Linux 5.13 and newer): from now on this process reads and writes only below the folders it names.

It holds for every thread started afterwards, so it must come before the first one. What an older kernel does not know
(truncating, TCP, signals) is left out: `confine` says which version of Landlock it got.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same on every architecture
_VERSION_FLAG = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 13, 1 << 14
_READ = _READ_FILE | _READ_DIR
_WRITE = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP = 0b11  # bind, connect: version 4
_SCOPED = 0b11  # abstract Unix sockets, signals: version 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def version() -> int:
    """The kernel's version of Landlock; 0 where there is none, or where it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return _call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def confine(read: Sequence[Path], write: Sequence[Path]) -> int:
    """Leave this process what lies below `read` to read and below `write` to change, and nothing to execute.

    Args:
        read: files and folders; those that do not exist are passed over.
        write: files and folders.

    Returns:
        The version of Landlock that holds now; 0 when there is none.

    Raises:
        RuntimeError: there are threads already, which would stay outside.
    """
    level = version()
    if level == 0:
        return 0
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a thread was started before the sandbox")
    handled = _FS_RIGHTS[min(level, 5)]
    rules = _Ruleset(handled, _TCP if level >= 4 else 0, _SCOPED if level >= 6 else 0)
    size = 8 if level < 4 else 16 if level < 6 else 24
    ruleset = _call(_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for rights, paths in ((_READ, read), (_WRITE, write)):
            for path in paths:
                _allow(ruleset, path, rights & handled)
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which restricting needs
        _call(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return level


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= _OF_A_FILE
        rule = _PathBeneath(rights, handle)
        _call(_ADD, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(handle)


def without(folder: Path, hole: Path) -> Iterator[Path]:
    """`folder`, or when `hole` lies inside it everything in it except the hole."""
    if not hole.is_relative_to(folder):
        yield folder
    elif folder != hole:
        for entry in folder.iterdir():
            yield from without(entry, hole)
