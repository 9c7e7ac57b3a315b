"""Files that no layout understands: carried as bytes in a directory; refused alone, with what to do."""

from __future__ import annotations

from typing import Any

from statecodec.errors import LayoutError, LegacyTorchFile, MalformedCheckpoint, UnknownLayout
from statecodec.layouts.base import SourceFile
from statecodec.layouts.listing import ListedFile, Listing
from statecodec.layouts.payload import Payload
from statecodec.layouts.protocol import Claim, Located

name = "opaque"

_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def claims(listing: Listing) -> Claim | None:
    """Everything."""
    return Claim(tuple(listing.files))


def locate(listing: Listing) -> Located:
    """The files as bytes, with a note on each that looks like a checkpoint."""
    return Located(tuple(carried(file, refusal(file)) for file in listing.files.values()))


def carried(file: ListedFile, why: LayoutError | None) -> SourceFile:
    """A file carried as bytes. The note says why, unless the file does not look like a checkpoint."""
    note = None if isinstance(why, UnknownLayout | None) or not file.nbytes else str(why)
    return SourceFile(file.path, file.nbytes, file.mode, name, note=note, identity=file.identity)


def tree(listing: Listing, read: Payload) -> Any:
    """The bytes of the file."""
    file = listing.only
    assert file is not None  # opaque files are taken one by one
    with file.open() as source:
        return source.read(0, file.nbytes)


def refusal(file: ListedFile) -> LayoutError:
    """The error for a file that no layout claims, judged by its first bytes."""
    head = file.head
    bare_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    members = {head[at : at + 100].rstrip(b"\0") for at in range(0, len(head), 512)}  # tar headers are 512-byte blocks
    old_tar = head[257:262] == b"ustar" and not members.isdisjoint({b"sys_info", b"pickle", b"storages", b"tensors"})
    if (head[:1] == b"\x80" and _LEGACY_MAGIC in head[:16]) or old_tar:
        return LegacyTorchFile(
            "a torch file from before torch 1.6, which cannot be read without running it. If you trust it: "
            "torch.save(torch.load(PATH, weights_only=False), NEW_PATH), then use NEW_PATH"
        )
    if not head:
        return MalformedCheckpoint("the file is empty")
    if bare_pickle:
        return UnknownLayout("a bare pickle, which cannot be read without running it; save it with torch.save")
    if b"PK\x03\x04" in head:
        return MalformedCheckpoint("unknown bytes before what looks like a zip archive")
    return UnknownLayout(
        "neither a torch.save file nor a safetensors file. Those are read, DCP folders, and directories of any files, "
        "in which a file like this is kept byte for byte: give its directory, or save what is in it with torch.save"
    )
