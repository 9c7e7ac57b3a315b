"""Locates the tensors of a checkpoint: asks the layouts, then names the tensors that their files do not name.

A file is judged by its content, never by its extension. A single file must be understood. In a directory nothing is
refused for its content: what is not understood, or looks like a checkpoint and is damaged, is carried as opaque bytes
with a note, so that one half-written shard does not keep a user from packing the rest. What cannot be carried
faithfully or safely is refused: symbolic links, devices, sockets and pipes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from statecodec.errors import LayoutError, UnknownLayout
from statecodec.layouts import opaque
from statecodec.layouts.base import LogicalTensor, Source, SourceFile
from statecodec.layouts.collecting import collector_paused
from statecodec.layouts.facts.assign import named
from statecodec.layouts.facts.frameworks import frameworks
from statecodec.layouts.listing import Listing, list_path
from statecodec.layouts.protocol import Layout, Located
from statecodec.layouts.registry import claimed


@collector_paused()
def locate(path: str | os.PathLike[str]) -> Source:
    """Locate the tensors of a checkpoint file or directory.

    Headers, directories and pickles are read, but no payload.

    Args:
        path: The file or directory.

    Returns:
        Its files, regions and tensors.

    Raises:
        UnknownLayout: For a single file that is no known checkpoint, and a path that is neither file nor directory.
        LegacyTorchFile: For a torch file from before 1.6.
        MalformedCheckpoint: For a truncated, lying or hostile file.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"w": torch.ones(8, 4)}}, f"{folder}/ckpt.pt")
        ...     source = locate(f"{folder}/ckpt.pt")
        >>> [(tensor.name, tensor.shape) for tensor in source.tensors], source.files[0].layout
        ([('model.w', (8, 4))], 'torch_zip')
    """
    root = Path(path)
    try:
        return locate_listing(list_path(root), root)
    except OSError as error:
        raise UnknownLayout(f"{root} cannot be read: {error.strerror or error}") from error
    except LayoutError as error:
        raise type(error)(f"{root}: {error}") from None


@collector_paused()
def locate_listing(listing: Listing, root: Path) -> Source:
    """Like `locate`, for files that are listed already.

    Args:
        listing: The files.
        root: The path that the result and messages name.

    Returns:
        Its files, regions and tensors.

    Raises:
        LayoutError: As for `locate`.
    """
    parts = [_located(layout, part) for layout, part in claimed(listing)]
    found = named(parts)
    tensors = sorted(found.tensors, key=_position)
    files = {file.path: file for located in parts for file in located.files}
    files.update(_links(listing, files))
    return Source(
        root,
        listing.is_directory,
        tuple(files[path] for path in sorted(files)),
        tuple(tensors),
        tuple(found.moments),
        tuple(found.momenta),
        tuple(found.quantised),
        listing.folders,
        frameworks(parts, tensors, listing),
    )


def _position(tensor: LogicalTensor) -> tuple[str, int]:
    return tensor.pieces[0].file, tensor.pieces[0].region


def _located(layout: Layout, part: Listing) -> Located:
    if layout is opaque and not part.is_directory and part.only is not None:
        raise opaque.refusal(part.only)
    try:
        return layout.locate(part)
    except LayoutError as error:
        if not part.is_directory:
            raise
        first, *others = part.files.values()
        return Located((opaque.carried(first, error), *(opaque.carried(file, None) for file in others)))


def _links(listing: Listing, files: dict[str, SourceFile]) -> Iterator[tuple[str, SourceFile]]:
    """The hard links, with the description of the file that they are another name of."""
    for path, original in (listing.same_as or {}).items():
        file = replace(files[original], path=path, regions=(), views=(), crcs=(), note=None, same_as=original)
        yield path, file
