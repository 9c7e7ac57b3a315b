"""Locates the tensors in a file of torch.save (1.6 and later): a zip of stored entries around one pickle.

    NAME/data.pkl                the object, with storages as persistent ids
    NAME/data/KEY                one storage's bytes each
    NAME/byteorder               "little" or "big" (since 2.1; little where it is missing)
    NAME/version, NAME/.format_version, NAME/.storage_alignment, NAME/.data/serialization_id

Everything but the storages is small and is held against its CRC; storages' CRCs are reported, not checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from statecodec.errors import LegacyTorchFile, MalformedCheckpoint, UnknownLayout
from statecodec.files import ByteSource
from statecodec.layouts.base import Crc32
from statecodec.layouts.describe import Described, Span, cut_all, read_scalars
from statecodec.layouts.pickle.nodes import StorageNode, TensorNode
from statecodec.layouts.pickle.reader import MAX_PICKLE_BYTES, read_pickle
from statecodec.layouts.walk import walk
from statecodec.layouts.zip_reader import Entry, read_checked, read_entries

_LEGACY_MAGIC: Final = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_WAY_OUT: Final = (
    "a torch file from before torch 1.6, which cannot be read without running it. If you trust it: "
    "torch.save(torch.load(PATH, weights_only=False), NEW_PATH), then use NEW_PATH"
)
_SMALL: Final = 1 << 20


@dataclass(frozen=True)
class Archive:
    """The parts of a torch zip: the pickle's bytes, and where each storage lies."""

    pickle: bytes
    storages: dict[str, Entry]


def is_zip(head: bytes) -> bool:
    """Whether a file's first bytes are those of a zip archive."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def refuse_legacy(head: bytes) -> None:
    """Raise LegacyTorchFile if a file's first bytes are those of a pre-1.6 torch.save."""
    bare_stream = head[:1] == b"\x80" and _LEGACY_MAGIC in head[:16]
    members = {head[at : at + 100].rstrip(b"\0") for at in range(0, len(head), 512)}  # tar headers are 512-byte blocks
    old_tar = head[257:262] == b"ustar" and not members.isdisjoint({b"sys_info", b"pickle", b"storages", b"tensors"})
    if bare_stream or old_tar:
        raise LegacyTorchFile(_WAY_OUT)


def open_archive(source: ByteSource, name: str) -> Archive:
    """Check the zip and read its pickle. Raises UnknownLayout for zips that are not of torch.save."""
    entries = {entry.name: entry for entry in read_entries(source)}
    prefixes = {entry_name.partition("/")[0] for entry_name in entries}
    prefix = next(iter(prefixes)) + "/" if len(prefixes) == 1 else ""
    for marker, what in (
        ("constants.pkl", "a TorchScript archive (torch.jit.save)"),
        ("code/", "a TorchScript archive (torch.jit.save)"),
        ("archive_format", "a torch.export archive"),
    ):
        if any(entry_name.startswith(prefix + marker) for entry_name in entries):
            raise UnknownLayout(
                f"{name} is {what}, which holds a program, not a checkpoint; save its state_dict() instead"
            )
    pickle = entries.get(prefix + "data.pkl") if prefix else None
    if pickle is None:
        raise UnknownLayout(f"{name} is a zip archive, but not of torch.save: it has no data.pkl in one top folder")
    _check_byteorder(source, entries.get(prefix + "byteorder"))
    data = prefix + "data/"
    for entry_name, entry in entries.items():
        if entry is not pickle and not entry_name.startswith(data) and entry.nbytes <= _SMALL:
            read_checked(source, entry, _SMALL)
    storages = {n[len(data) :]: entry for n, entry in entries.items() if n.startswith(data) and n != data}
    return Archive(read_checked(source, pickle, MAX_PICKLE_BYTES), storages)


def _check_byteorder(source: ByteSource, entry: Entry | None) -> None:
    order = b"little" if entry is None else read_checked(source, entry, 64)
    if order == b"big":
        raise MalformedCheckpoint(
            "written on a big-endian machine; load it there and save it again, or torch.load and torch.save it here"
        )
    if order != b"little":
        raise MalformedCheckpoint(f"byteorder is {order!r}; little or big was expected")


def check_storages(root: Any, archive: Archive) -> None:
    """Hold every storage that the pickle refers to against its archive entry. Raises MalformedCheckpoint."""
    for _, node in walk(root):
        storage = node.storage if type(node) is TensorNode else node if type(node) is StorageNode else None
        if storage is None or storage.location == "meta":
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


def describe(source: ByteSource, path: str, mode: int) -> Described:
    """Locate the tensors of a torch zip. Reads its headers, directory and pickle, no payload (but one-element tensors).

    Raises MalformedCheckpoint or UnknownLayout.
    """
    archive = open_archive(source, path)
    root = read_pickle(archive.pickle)
    check_storages(root, archive)
    spans = {key: Span(entry.offset, entry.nbytes) for key, entry in archive.storages.items()}
    cuts, names = cut_all(root, spans)
    crcs = tuple(Crc32(e.offset, e.nbytes, e.crc_at) for e in archive.storages.values() if e.crc_at and e.nbytes)
    return Described(
        path, source.size, mode, "torch_zip", root, True, cuts, names, crcs, read_scalars(source, cuts)
    )  # fmt: skip
