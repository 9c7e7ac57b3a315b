"""Opening a checkpoint, compressed or not. Only here is a path looked at to see which it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from statecodec.checkpoint.base import Checkpoint
from statecodec.checkpoint.native import load_native
from statecodec.checkpoint.pickles import safe_pickles
from statecodec.checkpoint.restored_bytes import load_files
from statecodec.checkpoint.sniff import is_compressed, of_many_ranks
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.errors import UsageError
from statecodec.layouts.payload import MEMORY, Room
from statecodec.lazy import torch


def open_checkpoint(path: str | Path, *, crcs: bool = True) -> SourceCheckpoint | StoredCheckpoint:
    """Open a checkpoint, compressed or not, to read single tensors. It is `statecodec.open`.

    Args:
        path: The file or directory.
        crcs: Of an uncompressed zip, check the CRC-32 of what is read.

    Returns:
        The open checkpoint, a context manager.

    Raises:
        FormatError: If a compressed file cannot be read, and for a folder that StatecodecWriter wrote.
        LayoutError: If an uncompressed one cannot.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"w": torch.ones(2, 2)}}, f"{folder}/ckpt.pt")
        ...     with statecodec.open(f"{folder}/ckpt.pt") as checkpoint:
        ...         checkpoint.names(), checkpoint.read("model.w")
        (['model.w'], tensor([[1., 1.],
                [1., 1.]]))
    """
    if is_compressed(path):
        return StoredCheckpoint.open(path)
    ranks = of_many_ranks(Path(path))
    if ranks is not None:
        raise ranks
    return SourceCheckpoint(path, crcs=crcs)


def load(path: str | Path, map_location: torch.device | str | int = "cpu", *, safe_only: bool = False) -> Any:
    """Load a checkpoint, compressed or not, as the nested object that torch.load would give.

    Nothing that the file names is imported or run: unknown classes come back as OpaqueObject with their name and
    contents. Tensors that shared memory share it again.

    Args:
        path: The file or directory.
        map_location: The device that all tensors go to, wherever they were when they were saved.
        safe_only: Refuse a checkpoint whose unpickling could run code (see `inspect`).

    Returns:
        What torch.load would give; of a safetensors file {name: tensor}; of a directory {path: content}.

    Raises:
        FormatError: If a compressed file cannot be read.
        LayoutError: If an uncompressed one cannot, or is unsafe with `safe_only`.
        UsageError: If `map_location` is no device.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"w": torch.zeros(2), "epoch": 3}, f"{folder}/ckpt.pt")
        ...     statecodec.load(f"{folder}/ckpt.pt")
        {'w': tensor([0., 0.]), 'epoch': 3}
    """
    device = _device(map_location)
    with open_checkpoint(path) as checkpoint:
        if safe_only:
            safe_pickles(checkpoint)
        return loaded(checkpoint, device)


def loaded(checkpoint: Checkpoint, device: torch.device, room: Room = MEMORY) -> Any:
    """The nested object that an open checkpoint holds; on the device `meta` without reading its tensors.

    Args:
        checkpoint: The open checkpoint.
        device: Where the tensors go.
        room: Where tensors are put before that. What `save` wrote is loaded into memory.

    Returns:
        The object, as for `load`.

    Raises:
        FormatError: If a compressed file cannot be read.
        LayoutError: If an uncompressed one cannot.
    """
    if isinstance(checkpoint, SourceCheckpoint):
        return checkpoint.load(device, room)
    assert isinstance(checkpoint, StoredCheckpoint)
    native = checkpoint.document.source["layout"] == "native"
    return load_native(checkpoint, device) if native else load_files(checkpoint, device, room)


def _device(map_location: torch.device | str | int) -> torch.device:
    """The one device that all tensors go to. Raises UsageError."""
    try:
        return torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"map_location={str(map_location)[:80]!r}: a device is expected, such as 'cpu', 'cuda' or 'cuda:1'"
        ) from error
