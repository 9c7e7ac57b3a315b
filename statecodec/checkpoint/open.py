"""Opening a checkpoint, compressed or not: the one place where a path is looked at to see which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from statecodec.checkpoint.native import load_native
from statecodec.checkpoint.restored_bytes import load_files
from statecodec.checkpoint.sniff import is_compressed
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import Stored
from statecodec.lazy import torch


def open_checkpoint(path: str | Path, *, crcs: bool = True) -> SourceCheckpoint | Stored:
    """Open a checkpoint, compressed or not, to read single tensors. Raises FormatError, LayoutError.

    `crcs`: as for SourceCheckpoint.
    """
    return Stored.open(path) if is_compressed(path) else SourceCheckpoint(path, crcs=crcs)


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
