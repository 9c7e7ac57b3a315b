"""Locates the tensors in a file of torch.save (1.6 and later): a zip of stored entries around one pickle.

    NAME/data.pkl                the object, with storages as persistent ids
    NAME/data/KEY                one storage's bytes each
    NAME/byteorder               "little" or "big" (since 2.1; little where it is missing)
    NAME/version, NAME/.format_version, NAME/.storage_alignment, NAME/.data/serialization_id

Everything but the storages is small and is held against its CRC; storages' CRCs are reported, not checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from statecodec.dtypes import DType
from statecodec.errors import MalformedCheckpoint, UnknownLayout
from statecodec.files import ByteSource
from statecodec.layouts.base import Crc32
from statecodec.layouts.graph import Graph, Span, storages
from statecodec.layouts.listing import Listing
from statecodec.layouts.objects import build, window
from statecodec.layouts.payload import Payload
from statecodec.layouts.pickle.reader import MAX_PICKLE_BYTES, read_pickle
from statecodec.layouts.protocol import Claim, Located
from statecodec.layouts.walk import most_tensors
from statecodec.layouts.zip_reader import ZipEntry, read_checked, read_entries
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

name: Final = "torch_zip"

_SMALL: Final = 1 << 20


@dataclass(frozen=True)
class Archive:
    """The parts of a torch zip: the pickle's bytes, and where each storage lies."""

    pickle: bytes
    storages: dict[str, ZipEntry]


def is_zip(head: bytes) -> bool:
    """Whether a file's first bytes are those of a zip archive."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def claims(listing: Listing) -> Claim | None:
    """A file that is a zip archive."""
    file = listing.only
    return Claim((file.path,)) if file is not None and is_zip(file.magic) else None


def locate(listing: Listing) -> Located:
    """Read the zip's headers and directory and the pickle, no payload (but one-element tensors).

    Raises MalformedCheckpoint or UnknownLayout.
    """
    file = listing.only
    assert file is not None
    with file.open() as source:
        archive, root = read_archive(source, file.path)
        return graph_of(archive, root).located(name, file, source, listing.prefix(file.path))


def graph_of(archive: Archive, root: Any, added: int = 0) -> Graph:
    """The object graph of an archive and where its storages are; `added`: tensors that its pickle does not name."""
    spans = {key: Span(entry.offset, entry.nbytes) for key, entry in archive.storages.items()}
    crcs = tuple(Crc32(e.offset, e.nbytes, e.crc_at) for e in archive.storages.values() if e.crc and e.nbytes)
    return Graph(root, spans, most_tensors(len(archive.pickle)) + added, ordered=True, crcs=crcs)


def tree(listing: Listing, read: Payload) -> Any:
    """What torch.load would give. Raises MalformedCheckpoint."""
    file = listing.only
    assert file is not None
    with file.open() as source:
        archive, root = read_archive(source, file.path)
    loaded: dict[str, Tensor] = {}

    def tensor(key: str, dtype: DType, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
        entry = archive.storages.get(key)
        if entry is None:  # a meta tensor: it never had bytes
            return torch.empty_strided(shape, stride, dtype=dtype.torch, device="meta")
        if key not in loaded:
            loaded[key] = read(file.path, entry.offset, entry.nbytes)
        return window(loaded[key], dtype, shape, stride, offset)

    return build(root, tensor)


def read_archive(source: ByteSource, path: str) -> tuple[Archive, Any]:
    """The archive and its object graph, whose storages are there. Raises MalformedCheckpoint or UnknownLayout."""
    archive = open_archive(source, path)
    root = read_pickle(archive.pickle)
    settle_storages(root, archive)
    return archive, root


def open_archive(source: ByteSource, path: str) -> Archive:
    """Check the zip and read its pickle. Raises UnknownLayout for zips that are not of torch.save."""
    entries = {entry.name: entry for entry in read_entries(source)}
    prefixes = {entry_name.partition("/")[0] for entry_name in entries}
    prefix = next(iter(prefixes)) + "/" if len(prefixes) == 1 else ""
    for marker, kind in (
        ("constants.pkl", "a TorchScript archive (torch.jit.save)"),
        ("code/", "a TorchScript archive (torch.jit.save)"),
        ("archive_format", "a torch.export archive"),
    ):
        if any(entry_name.startswith(prefix + marker) for entry_name in entries):
            raise UnknownLayout(
                f"{path} is {kind}, which holds a program, not a checkpoint; save its state_dict() instead"
            )
    pickle = entries.get(prefix + "data.pkl") if prefix else None
    if pickle is None:
        raise UnknownLayout(f"{path} is a zip archive, but not of torch.save: it has no data.pkl in one top folder")
    _check_byteorder(source, entries.get(prefix + "byteorder"))
    data = prefix + "data/"
    for entry_name, entry in entries.items():
        if entry is not pickle and not entry_name.startswith(data) and entry.nbytes <= _SMALL:
            read_checked(source, entry, _SMALL)
    storages = {n[len(data) :]: entry for n, entry in entries.items() if n.startswith(data) and n != data}
    return Archive(read_checked(source, pickle, MAX_PICKLE_BYTES), storages)


def _check_byteorder(source: ByteSource, entry: ZipEntry | None) -> None:
    order = b"little" if entry is None else read_checked(source, entry, 64)
    if order == b"big":
        raise MalformedCheckpoint(
            "written on a big-endian machine; load it there and save it again, or torch.load and torch.save it here"
        )
    if order != b"little":
        raise MalformedCheckpoint(f"byteorder is {order!r}; little or big was expected")


def settle_storages(root: Any, archive: Archive) -> None:
    """Compare every storage that the pickle refers to with its archive entry. Raises MalformedCheckpoint."""
    for storage in storages(root, most_tensors(len(archive.pickle))):
        if storage.location == "meta":
            continue
        entry = archive.storages.get(storage.key)
        if entry is None:
            raise MalformedCheckpoint(f"storage {storage.key!r:.80} has no entry in the archive")
        if storage.numel is None:
            storage.numel = entry.nbytes
        claimed = storage.numel * storage.dtype.itemsize
        if entry.nbytes != claimed:
            raise MalformedCheckpoint(
                f"storage {storage.key!r:.80} claims {claimed} bytes but its entry has {entry.nbytes}"
            )
