"""A stand-in for the library, small and fast, with every bad habit a conversion can have.

What it does depends on the first bytes of its input: `BEHAVE name argument\\n`. The settings of a test service name
this module as their backend; nothing of the product imports it.
"""

import os
import signal
import time
import zlib
from pathlib import Path

__all__ = ["compress", "diff", "inspect", "restore", "verify"]


class MalformedCheckpoint(Exception):
    """Carries a stable code, as the library's errors do."""

    code = "layout.malformed"


class Report:
    """The shape of the library's report."""

    def __init__(self, **fields):
        self._fields = fields

    def to_json(self):
        """The JSON document."""
        return self._fields


def _files(path):
    return [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())


def _behave(path, progress):
    head = _files(path)[0].open("rb").read(200).split(b"\n")[0].decode(errors="replace").split()
    if len(head) < 2 or head[0] != "BEHAVE":
        return
    what, rest = head[1], head[2:]
    if what == "slow":
        steps = int(rest[0])
        for step in range(steps):
            progress(step, steps, "encoding")
            time.sleep(0.05)
    elif what == "refuse":
        raise MalformedCheckpoint(f"{path} is truncated")
    elif what == "bug":
        raise ZeroDivisionError("a bug")
    elif what == "crash":
        os.abort()
    elif what == "crash-until":  # it can leave no note for its next attempt: somebody else puts one beside its input
        if not (path.parent / rest[0]).exists():
            os.abort()
    elif what == "memory":
        hog = []
        while True:
            hog.append(b"x" * (16 << 20))
    elif what == "hang":
        time.sleep(3600)
    elif what == "full":
        raise OSError(28, "No space left on device")
    elif what == "network":
        import socket

        socket.create_connection(("127.0.0.1", int(rest[0])), 2)
    elif what == "escape":
        Path(rest[0]).write_text("escaped")
    elif what == "pickle":
        import pickle

        pickle.loads(b"cposix\nsystem\n(S'true'\ntR.")
    elif what == "shell":
        import subprocess

        subprocess.run(["true"], check=False)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def _pack(name, data):
    import json

    packed = zlib.compress(data, 1)
    header = {
        "__metadata__": {"format": "statecodec"},
        "weight/codes": {"dtype": "U8", "shape": [len(packed)], "data_offsets": [0, len(packed)]},
        "__manifest__": {"dtype": "U8", "shape": [4], "data_offsets": [len(packed), len(packed) + 4]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + packed + b"done"


def compress(src, dst=None, *, preset="resume", progress=None, base=None, threads=None, device="auto", **options):
    """Write a safetensors file (or one per input file) holding the zlib-compressed bytes."""
    total = sum(path.stat().st_size for path in _files(src))
    progress(0, total, "encoding")
    _behave(src, progress)
    before = after = 0
    tensors = []
    for path in _files(src):
        data = path.read_bytes()
        target = dst if src.is_file() else dst.parent / "shards" / (str(path.relative_to(src)) + ".sc.safetensors")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_pack(path.name, data))
        before, after = before + len(data), after + target.stat().st_size
        progress(before, total, "encoding")
        tensors.append(
            {
                "name": "weight", "role": "weight", "shape": [len(data)], "dtype": "uint8", "codec": "raw",
                "bytes_before": len(data), "bytes_after": target.stat().st_size, "error": {"relative_rms": 0.001},
            }
        )  # fmt: skip
    return Report(
        format_version=[1, 0], source={"layout": "torch_zip", "bytes": before, "sha256": "0" * 64, "name": str(src)},
        path=str(dst), bytes=after, ratio=before / max(after, 1), bytes_per_param=4.0, num_params=before // 12,
        seconds=0.1, preset=preset, tensors=tensors, notes=[],
    )  # fmt: skip


def restore(src, dst=None, *, progress=None, threads=None, device="auto"):
    """Give the bytes back."""
    data = src.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if not data[8 + size :].endswith(b"done"):
        raise MalformedCheckpoint(f"{src} is not ours")
    restored = zlib.decompress(data[8 + size : -4])
    dst.write_bytes(restored)
    progress(len(restored), len(restored), "decoding")
    return Report(path=str(dst), bytes=len(restored), source={"bytes": len(restored)}, tensors=[], notes=[])


def inspect(src):
    """Say how long it is."""
    _behave(src, lambda *_: None)
    return Report(
        bytes=sum(path.stat().st_size for path in _files(src)), tensors=[], notes=[], count=len(_files(src)),
        source={"name": "original.pt"}, names=[path.relative_to(src).as_posix() for path in _files(src) if path != src],
    )  # fmt: skip


def verify(src, against=None, *, progress=None):
    """Nothing is ever wrong."""
    return Report(bytes=src.stat().st_size, tensors=[], notes=[])


def diff(a, b, *, progress=None):
    """Whether they are the same."""
    return Report(tensors=[], updates=[], total={"same": a.read_bytes() == b.read_bytes()})
