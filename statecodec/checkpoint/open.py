"""Opening a checkpoint, compressed or not: the one place where a path is looked at to see which."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import torch

from statecodec.checkpoint.native import load_native
from statecodec.checkpoint.restored_bytes import load_files
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import Stored
from statecodec.errors import FormatError
from statecodec.format.index import INDEX_SUFFIX

_HEAD = 1 << 16


def open_checkpoint(path: str | Path) -> SourceCheckpoint | Stored:
    """Open a checkpoint, compressed or not, to read single tensors. Raises FormatError, LayoutError."""
    return Stored.open(path) if is_compressed(path) else SourceCheckpoint(path)


def load(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """The nested object that torch.load would give (safetensors: {name: tensor}; a directory: {path: content}),
    decoded.

    Nothing the file names is imported or run: unknown classes come back as OpaqueObject with their name and contents.
    Tensors that shared memory share it again. Raises FormatError or LayoutError.
    """
    with open_checkpoint(path) as checkpoint:
        if isinstance(checkpoint, SourceCheckpoint):
            return checkpoint.load(device)
        native = checkpoint.document.source["layout"] == "native"
        return load_native(checkpoint, device) if native else load_files(checkpoint, device)


def is_compressed(path: str | Path) -> bool:
    """Whether a path is one of our files (by its content, not its name)."""
    path = Path(path)
    if path.is_dir():
        return False
    if path.exists() and not path.name.endswith(INDEX_SUFFIX):
        return b'"format":"statecodec"' in _head(path)
    index = path if path.exists() else path.with_name(path.name.removesuffix(".safetensors") + INDEX_SUFFIX)
    return index.exists() and b"statecodec.manifest" in _head(index)


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; nothing of anything else, which might have no end, or never begin."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(_HEAD) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error
