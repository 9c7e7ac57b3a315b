"""Opening a checkpoint, compressed or not: the one place where a path is looked at to see which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from statecodec.checkpoint.base import Checkpoint, Keep, unchanged
from statecodec.checkpoint.native import load_native
from statecodec.checkpoint.pickles import require_safe
from statecodec.checkpoint.restored_bytes import load_files
from statecodec.checkpoint.sniff import is_compressed
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.errors import UsageError
from statecodec.lazy import torch


def open_checkpoint(path: str | Path, *, crcs: bool = True) -> SourceCheckpoint | StoredCheckpoint:
    """Open a checkpoint, compressed or not, to read single tensors. Raises FormatError, LayoutError.

    `crcs`: as for SourceCheckpoint.
    """
    return StoredCheckpoint.open(path) if is_compressed(path) else SourceCheckpoint(path, crcs=crcs)


def load(path: str | Path, map_location: torch.device | str | int = "cpu", *, safe_only: bool = False) -> Any:
    """The nested object that torch.load would give (safetensors: {name: tensor}; a directory: {path: content}),
    decoded.

    Nothing the file names is imported or run: unknown classes come back as OpaqueObject with their name and contents.
    Tensors that shared memory share it again. `map_location` is the device that they all go to, wherever they were
    when they were saved. With `safe_only` a checkpoint whose unpickling could run code (see `inspect`) is refused.

    Raises FormatError, LayoutError, UsageError.
    """
    device = _device(map_location)
    with open_checkpoint(path) as checkpoint:
        if safe_only:
            require_safe(checkpoint)
        return loaded(checkpoint, device)


def loaded(checkpoint: Checkpoint, device: torch.device, keep: Keep = unchanged) -> Any:
    """The nested object that an open checkpoint holds; on the device `meta` without reading its tensors.

    `keep` is given the bytes of every storage as they are read, and gives what the object shall have. Raises as `load`
    does.
    """
    if isinstance(checkpoint, SourceCheckpoint):
        return checkpoint.load(device, keep)
    assert isinstance(checkpoint, StoredCheckpoint)
    native = checkpoint.document.source["layout"] == "native"
    return load_native(checkpoint, device) if native else load_files(checkpoint, device, keep)


def _device(map_location: torch.device | str | int) -> torch.device:
    """The one device that all tensors go to. Raises UsageError."""
    try:
        return torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"map_location={str(map_location)[:80]!r}: a device is expected, such as 'cpu', 'cuda' or 'cuda:1'"
        ) from error
