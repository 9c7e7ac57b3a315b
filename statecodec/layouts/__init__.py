"""Locates the tensors inside other programs' checkpoints, byte for byte, without ever running them.

`locate` takes a file of torch.save or safetensors, or a directory of any files, and says which byte ranges hold which
tensors. `tree` rebuilds the nested Python object from the same bytes. Nothing in this package imports, calls or
unpickles what a file names. A layout is one module (protocol.py) and one row (registry.py).
"""

from __future__ import annotations

from statecodec.layouts.base import (
    Box,
    Crc32,
    Folder,
    LogicalTensor,
    Piece,
    Region,
    Run,
    Source,
    SourceFile,
    StatePart,
    View,
)
from statecodec.layouts.listing import ListedFile, Listing, list_memory, list_path
from statecodec.layouts.locate import locate
from statecodec.layouts.moments import AdamSettings, Moments, Momentum, QuantisedMoments, QuantisedState
from statecodec.layouts.objects import OpaqueObject, window
from statecodec.layouts.payload import Payload, Read
from statecodec.layouts.protocol import Claim, Layout, Located
from statecodec.layouts.tree import tree, tree_from_pickle

__all__ = [
    "AdamSettings",
    "Box",
    "Claim",
    "Crc32",
    "Folder",
    "Layout",
    "ListedFile",
    "Listing",
    "Located",
    "LogicalTensor",
    "Moments",
    "Momentum",
    "OpaqueObject",
    "Payload",
    "Piece",
    "QuantisedMoments",
    "QuantisedState",
    "Read",
    "Region",
    "Run",
    "Source",
    "SourceFile",
    "StatePart",
    "View",
    "list_memory",
    "list_path",
    "locate",
    "tree",
    "tree_from_pickle",
    "window",
]
