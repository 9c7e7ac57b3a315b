"""Tells whether a path is a compressed checkpoint."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from statecodec.errors import FormatError
from statecodec.format.index import INDEX_SUFFIX
from statecodec.layouts.safetensors_file import is_safetensors
from statecodec.layouts.torch_zip import is_zip
from statecodec.suffixes import INDEX, SUFFIX

_HEAD = 1 << 16
_RANKS = f"rank-*{SUFFIX}"


def is_compressed(path: str | Path) -> bool:
    """Whether a path is one of our files (by its content, not its name)."""
    path = Path(path)
    if path.is_dir():
        return False
    if path.exists() and not path.name.endswith(INDEX_SUFFIX):
        return b'"format":"statecodec"' in _head(path)
    index = path if path.exists() else path.with_name(path.name.removesuffix(".safetensors") + INDEX_SUFFIX)
    return index.exists() and b"statecodec.manifest" in _head(index)


def not_compressed(path: Path) -> FormatError | None:
    """The error for a checkpoint that is not a compressed one; None for a damaged one, or anything else."""
    ranks = of_many_ranks(path)
    if ranks is not None:
        return ranks
    if path.is_dir():
        kind = "directory"
    elif not path.is_file():
        return None
    else:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        foreign = is_safetensors(head, path.stat().st_size) and b"statecodec" not in head
        kind = "torch.save file" if is_zip(head) else "plain safetensors file" if foreign else ""
    return FormatError(f"{path} is a {kind}, not a compressed checkpoint; `compress` makes one") if kind else None


def of_many_ranks(path: Path) -> FormatError | None:
    """The error for a folder that StatecodecWriter wrote: it is compressed, and not read as a folder of files."""
    if not path.is_dir():
        return None
    files = sorted(path.glob(_RANKS))
    index = path / INDEX
    if not files or not (index.is_file() and b'"statecodec_dcp"' in _head(index)):
        return None
    reader = f"statecodec.distributed.StatecodecReader({str(path)!r})"
    return FormatError(
        f"{path} is a checkpoint that StatecodecWriter wrote, compressed already, in {len(files)} file(s). "
        f"torch.distributed.checkpoint.load(state, storage_reader={reader}) loads it, on any number of ranks; "
        f"inspect, verify and restore take one of its files, such as {files[0].name}"
    )


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; none of a pipe or device, which might have no end, or never begin."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(_HEAD) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error
