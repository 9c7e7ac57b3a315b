"""Locates the tensors inside somebody else's checkpoint, byte for byte, without ever running it.

`locate` takes a file of torch.save or safetensors, or a directory of any files, and says which byte ranges hold which
tensors. `tree` rebuilds the nested Python object from the same bytes. Nothing in this package imports, calls or
unpickles what a file names.
"""

from __future__ import annotations

from statecodec.files import ByteSource, FileBytes, Identity, MemoryBytes
from statecodec.layouts.base import (
    Crc32,
    Folder,
    Moments,
    Region,
    Source,
    SourceFile,
    View,
)
from statecodec.layouts.directory import locate
from statecodec.layouts.tree import OpaqueObject, tree, tree_from_pickle

__all__ = [
    "ByteSource",
    "Crc32",
    "FileBytes",
    "Folder",
    "Identity",
    "MemoryBytes",
    "Moments",
    "OpaqueObject",
    "Region",
    "Source",
    "SourceFile",
    "View",
    "locate",
    "tree",
    "tree_from_pickle",
]
