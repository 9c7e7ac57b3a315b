"""Default names of outputs, and sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path

from statecodec.errors import UsageError
from statecodec.suffixes import SUFFIX, stem

INDEX_SUFFIX = ".index.json"

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def named(source: Path) -> Path:
    """A path that ends in the file's or directory's name: `.` and `run/..` do not."""
    return source.resolve() if source.name in ("", "..") else source


def compressed_path(source: Path) -> Path:
    """Where `compress` writes by default: ckpt.pt -> ckpt.sc.safetensors, a directory run/ -> run.sc.safetensors.

    Raises UsageError for the root directory, which has no name.
    """
    source = named(source)
    name = source.name
    if not name:
        raise UsageError(f"{source} has no name to derive the output's from; say where to write (-o)")
    return source.with_name((stem(name) if source.is_file() else name) + SUFFIX)


def restored_path(compressed: Path, original_name: str | None) -> Path:
    """Where `restore` writes by default: the original's name (untrusted), beside the compressed file."""
    name = re.sub(r"[\x00-\x1f\x7f/]", "_", original_name or "")
    return compressed.parent / (name if name not in ("", ".", "..") else "restored")


def original_name(target: Path) -> str:
    """The name of the original that a compressed file's name stands for."""
    return target.name.removesuffix(".safetensors").removesuffix(".sc") + ".pt"


def parse_size(size: str | int | None) -> int | None:
    """Bytes of `5GB`, `500 MiB`, `1000000` or None. Raises UsageError."""
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if not match or match.group(2).upper() not in _UNITS or not float(match.group(1)):
        raise UsageError(f"size {size!r}: expected a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])
