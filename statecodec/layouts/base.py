"""What locating a checkpoint yields: regions, which are stored, and tensors, which people mean.

A file is *skeleton* plus *regions*. A region is a byte range that holds numbers and may be encoded as one tensor;
everything else (headers, pickles, padding) is skeleton and is kept byte for byte. A logical tensor has a name, a role
and a shape, and lies in one region or in several: chunks of a sharded checkpoint, two ranks' partitions. Views say
under which names a file's own objects look into its regions. Nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from statecodec.dtypes import DType
from statecodec.files import IN_MEMORY, Identity
from statecodec.layouts.moments import Moments, Momentum, QuantisedMoments
from statecodec.roles import Role

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A byte range that can be encoded as one tensor, in physical (contiguous) order.

    Args:
        offset: First byte in the file.
        nbytes: Number of bytes.
        dtype: How the bytes are read.
        shape: The shape in which they are encoded.
        lossless: Only a lossless byte codec may be used, because several different, overlapping or strided windows look
            at it.
    """

    offset: int
    nbytes: int
    dtype: DType
    shape: Shape
    lossless: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor.

    Args:
        offset: First index along every dimension.
        shape: Size along every dimension.
    """

    offset: Shape
    shape: Shape


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a flattened tensor.

    Args:
        start: First element.
        stop: One past the last element.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a logical tensor that a region holds, in row-major order. No region holds parts of two tensors.

    Args:
        file: Path of the SourceFile.
        region: Index into its regions.
        part: Which part of the tensor it is; None for all of it.
    """

    file: str
    region: int
    part: Box | Run | None = None


@dataclass(frozen=True, slots=True)
class StatePart:
    """One part of a state that a live optimizer keeps encoded.

    Args:
        part: Its name in the codec.
        role: The role of the state.
        codec: The codec's text, or its config as JSON. Not checked.
        shape: Shape of the decoded state.
        dtype: Name of the dtype of the decoded state.
    """

    part: str
    role: Role
    codec: str
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as rules, reports and budgets see it.

    Args:
        name: Unique in the checkpoint; in a directory it begins with the file's or folder's path and a colon.
        dtype: The file's own; a region of a dtype that cannot be encoded is one of bytes.
        shape: Its shape.
        pieces: Where it lies; the pieces are disjoint and together the whole tensor.
        role: What it is to the optimizer.
        param: Name of the weight that this tensor is, or is the optimizer state of, where that is certain.
        state: The encoded state that it is a part of.
    """

    name: str
    dtype: DType
    shape: Shape
    pieces: tuple[Piece, ...]
    role: Role = "other"
    param: str | None = None
    state: StatePart | None = None


@dataclass(frozen=True, slots=True)
class View:
    """A named tensor of a file: a strided window into one region.

    Args:
        name: Its name in the file.
        region: Index into SourceFile.regions.
        dtype: Its dtype.
        shape: Its shape.
        stride: In elements of dtype.
        offset: In elements of dtype, from the region's first byte.
    """

    name: str
    region: int
    dtype: DType
    shape: Shape
    stride: Shape
    offset: int


@dataclass(frozen=True, slots=True)
class Crc32:
    """A CRC-32 of file[offset:offset+nbytes], and where the file holds it.

    Args:
        offset: First byte that it is of.
        nbytes: Number of bytes that it is of.
        at: File offsets at which it stands, little-endian.
    """

    offset: int
    nbytes: int
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a checkpoint, located.

    Args:
        path: Relative posix path; for a single-file source its base name.
        nbytes: Its size.
        mode: Its permission bits.
        layout: Name of the layout that located it; `opaque`: carried as bytes.
        regions: Sorted by offset, disjoint.
        views: The names that its own objects have.
        crcs: The CRCs that a restored file with other numbers needs anew.
        same_as: Path of an earlier file of the directory that this one is a hard link to; regions are then given only
            there.
        note: Why a file of a directory that looked like a checkpoint is carried as opaque bytes.
        identity: What the file was when it was located, for whoever reads it later.
    """

    path: str
    nbytes: int
    mode: int
    layout: str
    regions: tuple[Region, ...] = ()
    views: tuple[View, ...] = ()
    crcs: tuple[Crc32, ...] = ()
    same_as: str | None = None
    note: str | None = None
    identity: Identity = IN_MEMORY


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory of a checkpoint.

    Args:
        path: Relative posix path; "" for the checkpoint's own directory.
        mode: Its permission bits; None where a compressed checkpoint does not say.
        mtime_ns: Time of its last change, in nanoseconds; None where a compressed checkpoint does not say.
    """

    path: str
    mode: int | None
    mtime_ns: int | None


@dataclass(frozen=True)
class Source:
    """A located checkpoint: one file, or a directory of files.

    Args:
        root: Its path.
        is_directory: Whether it is a directory.
        files: Sorted by path.
        tensors: Sorted by file and offset of their first piece. Every region belongs to exactly one of them.
        moments: The pairs of Adam's moments.
        momenta: The momenta from which alone a weight's step follows.
        quantised: The pairs of Adam's moments that another package keeps quantised.
        folders: The directory itself and all subdirectories, sorted by path, empty ones included; empty for a single
            file.
        framework: What wrote it, as far as a layout can tell.
    """

    root: Path
    is_directory: bool
    files: tuple[SourceFile, ...]
    tensors: tuple[LogicalTensor, ...] = ()
    moments: tuple[Moments, ...] = ()
    momenta: tuple[Momentum, ...] = ()
    quantised: tuple[QuantisedMoments, ...] = ()
    folders: tuple[Folder, ...] = ()
    framework: str | None = None

    @property
    def directories(self) -> tuple[str, ...]:
        """Relative posix paths of all subdirectories."""
        return tuple(folder.path for folder in self.folders if folder.path)
