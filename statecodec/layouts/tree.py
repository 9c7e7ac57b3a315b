"""The nested object that a checkpoint holds, without running what its files name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from statecodec.errors import LayoutError
from statecodec.layouts import opaque
from statecodec.layouts.collecting import collector_paused
from statecodec.layouts.listing import Listing, list_path
from statecodec.layouts.objects import TensorSource, build
from statecodec.layouts.payload import Payload, Read
from statecodec.layouts.pickle.reader import read_pickle
from statecodec.layouts.registry import claimed

if TYPE_CHECKING:
    from torch import Tensor

_PIECE: Final = 16 << 20


@collector_paused()
def tree_from_pickle(data: bytes, tensor: TensorSource) -> Any:
    """The object that a pickle of a torch file describes.

    Args:
        data: The content of the file's data.pkl.
        tensor: Supplies each tensor: (storage key, dtype, shape, stride, offset in elements) -> that window.

    Returns:
        The object; unknown classes come back as OpaqueObject.

    Raises:
        MalformedCheckpoint: If the pickle is damaged, or holds what a torch file does not.
    """
    return build(read_pickle(data), tensor)


@collector_paused()
def tree(source: str | os.PathLike[str] | Listing, read: Read | Payload | None = None) -> Any:
    """The content of a checkpoint: torch files as torch.load would give them, safetensors as {name: tensor}.

    Args:
        source: A file, a directory, or a listing of files of which only the skeleton is read.
        read: Supplies the numbers: (path, offset, nbytes) -> uint8 tensor. By default they come from the same files.

    Returns:
        Of a single file its content. Of a directory {relative path: content}, with the bytes of files that are not
        understood or damaged (in a listing, damaged ones are errors); files that make up one checkpoint together are
        given under their folder's path. Of a directory that is one such checkpoint, its content.

    Raises:
        LayoutError: If a file is damaged, or a single one is not understood.
    """
    listing = source if isinstance(source, Listing) else list_path(Path(source))
    read = read or Payload(partial(_fill, listing))
    payload = read if isinstance(read, Payload) else Payload.of(read)
    content: dict[str, Any] = {}
    for layout, part in claimed(listing):
        only = part.only
        if layout is opaque and only is not None and not listing.is_directory:
            raise opaque.refusal(only)
        try:
            value = layout.tree(part, payload)
        except LayoutError:
            if not listing.is_directory or isinstance(source, Listing):
                raise
            content.update({path: opaque.tree(part.of((path,)), payload) for path in part.files})
            continue
        if only is None and len(part.files) == len(listing.files):
            return value
        content[part.folder or "." if only is None else only.path] = value
    if not listing.is_directory:
        return next(iter(content.values()))
    for path, original in (listing.same_as or {}).items():
        content[path] = content[original]
    return {path: content[path] for path in sorted(content)}


def _fill(listing: Listing, path: str, offset: int, out: Tensor) -> Iterator[int]:
    view = out.numpy()
    with listing.files[path].open() as source:
        for at in range(0, len(view), _PIECE):
            piece = source.read(offset + at, min(_PIECE, len(view) - at))
            view[at : at + len(piece)] = memoryview(piece)
            yield len(piece)
