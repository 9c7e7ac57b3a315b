"""What locating a checkpoint yields: regions, which are what is stored, and tensors, which are what people mean.

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
from statecodec.roles import Role

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A byte range that can be encoded as one tensor, in physical (contiguous) order."""

    offset: int
    """First byte in the file."""
    nbytes: int
    dtype: DType
    shape: Shape
    lossless: bool = False
    """Several different, overlapping or strided windows look at it: only a lossless byte codec may be used."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: first index and size along every dimension."""

    offset: Shape
    shape: Shape


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a tensor: elements `start` to `stop` of it, flattened."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a logical tensor that a region holds, in row-major order. No region holds parts of two tensors."""

    file: str
    """SourceFile.path."""
    region: int
    """Index into SourceFile.regions."""
    part: Box | Run | None = None
    """None: all of the tensor."""


@dataclass(frozen=True, slots=True)
class StatePart:
    """A part of a state that a live optimizer keeps encoded. `shape` and `dtype` are those of the decoded state."""

    part: str
    role: Role
    codec: str
    """The codec's text, or its config, as JSON. Not checked."""
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as rules, reports and budgets see it."""

    name: str
    """Unique in the checkpoint; in a directory it begins with the file's or folder's path and a colon."""
    dtype: DType
    """The file's own: a region of a dtype that cannot be encoded is one of bytes."""
    shape: Shape
    pieces: tuple[Piece, ...]
    """Disjoint; together they are the whole tensor."""
    role: Role = "other"
    param: str | None = None
    """Name of the weight that this tensor is, or is the optimizer state of, where that is certain."""
    state: StatePart | None = None
    """The encoded state that it is a part of."""


@dataclass(frozen=True, slots=True)
class View:
    """A named tensor of a file: a strided window into one region."""

    name: str
    region: int
    """Index into SourceFile.regions."""
    dtype: DType
    shape: Shape
    stride: Shape
    """In elements of dtype."""
    offset: int
    """In elements of dtype, from the region's first byte."""


@dataclass(frozen=True, slots=True)
class Crc32:
    """A CRC-32 of file[offset:offset+nbytes] that stands, little-endian, at each file offset of `at`."""

    offset: int
    nbytes: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class AdamSettings:
    """The numbers of one parameter's Adam update.

    `lr`, `weight_decay` and `step` are None where the file does not say.
    """

    param: str | None
    beta1: float
    beta2: float
    eps: float
    lr: float | None
    weight_decay: float | None
    step: float | None


@dataclass(frozen=True)
class Moments(AdamSettings):
    """What the Adam update of one parameter needs. `exp_avg`, `exp_avg_sq` and `weight` are names of tensors.

    `weight` is None where the weight is unknown (`param` may still name it).
    """

    exp_avg: str
    exp_avg_sq: str
    weight: str | None


@dataclass(frozen=True)
class MomentumSettings:
    """One step moves a weight by `lr` times an update whose rms is `update`; None: the update is the momentum itself.

    `lr` is None where the file does not say.
    """

    lr: float | None
    update: float | None
    orthogonal: bool
    """The update is the momentum with all its singular values made equal: small ones are amplified."""


@dataclass(frozen=True)
class Momentum(MomentumSettings):
    """A momentum that trains a weight without a second moment: SGD's, Lion's, Muon's. Both are names of tensors."""

    momentum: str
    weight: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a checkpoint, located."""

    path: str
    """Relative posix path; for a single-file source its base name."""
    nbytes: int
    mode: int
    """Permission bits."""
    layout: str
    """Name of the layout that located it; "opaque": carried as bytes."""
    regions: tuple[Region, ...] = ()
    """Sorted by offset, disjoint."""
    views: tuple[View, ...] = ()
    crcs: tuple[Crc32, ...] = ()
    same_as: str | None = None
    """Path of an earlier file of the directory that this one is a hard link to; regions are then given only there."""
    note: str | None = None
    """Why a file of a directory that looked like a checkpoint is carried as opaque bytes."""
    identity: Identity = IN_MEMORY
    """Of the file when it was located, for whoever reads it later."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory of a checkpoint."""

    path: str
    """Relative posix path; "" for the checkpoint's own directory."""
    mode: int | None
    """Permission bits."""
    mtime_ns: int | None
    """Both are None where nobody noted them (a compressed checkpoint made without)."""


@dataclass(frozen=True)
class Source:
    """A checkpoint: one file, or a directory of files."""

    root: Path
    is_directory: bool
    files: tuple[SourceFile, ...]
    tensors: tuple[LogicalTensor, ...] = ()
    """By file and offset of their first piece. Every region belongs to exactly one of them."""
    moments: tuple[Moments, ...] = ()
    momenta: tuple[Momentum, ...] = ()
    folders: tuple[Folder, ...] = ()
    """The directory itself and all subdirectories, sorted by path, empty ones included; nothing for a single file."""
    framework: str | None = None
    """What wrote it, as far as a layout can tell."""

    @property
    def directories(self) -> tuple[str, ...]:
        """Relative posix paths of all subdirectories."""
        return tuple(folder.path for folder in self.folders if folder.path)
