"""The bytes outside tensors without those that follow from the tensors: checksums in zip archives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from statecodec.checkpoint.base import Checkpoint, TensorInfo
from statecodec.checkpoint.restored_bytes import original_listing
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import Crc32, ListedFile
from statecodec.layouts.torch_zip import is_zip
from statecodec.layouts.zip_reader import read_entries
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_CRC_BYTES = 4
_SERIALIZATION_ID = "/.data/serialization_id"
"""An entry that torch.save makes from the names and the CRCs of all others."""


def without_checksums(side: Checkpoint, skeleton: TensorInfo) -> Iterator[Tensor]:
    """Read the skeleton of a file in order, with zeros in place of what follows from its tensors."""
    start, follows = 0, np.array(sorted(_follows(side, skeleton.index)), np.int64)
    for piece in side.stream(skeleton):
        first, last = np.searchsorted(follows, (start, start + piece.numel()))
        if first < last:
            piece = piece.clone()
            piece[torch.from_numpy(follows[first:last] - start)] = 0
        yield piece
        start += piece.numel()


def _follows(side: Checkpoint, skeleton: int) -> Iterator[int]:
    """Positions in the skeleton of bytes that follow from the tensors of its file."""
    file = _file(side, skeleton)
    if file is None:
        return
    spans = [(at, _CRC_BYTES) for crc in file.crcs for at in crc.at]
    if is_zip(file.content.magic):
        spans += _serialization_id(file.content)
    for start, nbytes in spans:
        for offset, length in file.skeleton.within(start, start + nbytes):
            first = file.skeleton.position(offset)
            yield from range(first, first + length)


def _serialization_id(file: ListedFile) -> list[tuple[int, int]]:
    try:
        with file.open() as source:
            entries = [e for e in read_entries(source) if e.name.endswith(_SERIALIZATION_ID)]
    except MalformedCheckpoint:  # some other zip
        return []
    return [*((e.offset, e.nbytes) for e in entries), *((at, _CRC_BYTES) for e in entries for at in e.crc_at)]


class _File(NamedTuple):
    content: ListedFile
    skeleton: Skeleton
    crcs: tuple[Crc32, ...]


def _file(side: Checkpoint, skeleton: int) -> _File | None:
    """The file that a skeleton is of; None for what `save` wrote."""
    if isinstance(side, SourceCheckpoint):
        number = side.items[skeleton].file
        located = side.located.files[number]
        return _File(side.original_listing(crcs=False).files[located.path], side.skeletons[number], located.crcs)
    assert isinstance(side, StoredCheckpoint)
    for file in side.document.files:
        if file.skeleton == skeleton:
            sizes = [(offset, side.reader.items[i].decoded_nbytes) for offset, i in file.regions]
            return _File(original_listing(side).files[file.path], Skeleton(file.nbytes, sizes), file.crcs)
    return None
