"""What locating a checkpoint's tensors yields: regions, views, checksums to recompute, and the moments of Adam.

A file is *skeleton* plus *regions*. A region is a byte range that holds numbers and may be encoded as one tensor;
everything else (headers, pickles, padding) is skeleton and is kept byte for byte. Views say how the file's own named
tensors look into the regions. Nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from statecodec.files import IN_MEMORY, Identity
from statecodec.roles import Role


@dataclass(frozen=True)
class Region:
    """A byte range that can be encoded as one tensor, in physical (contiguous) order."""

    offset: int
    """First byte in the file."""
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str
    """Unique in the file: the first view's dotted key path, or "storage:KEY" where no tensor looks at the storage."""
    role: Role = "other"
    param: str | None = None
    """Name of the weight that this tensor is, or is the optimizer state of, where that is certain."""
    lossless: bool = False
    """Several different, overlapping or strided windows look at it: only a lossless byte codec may be used."""


@dataclass(frozen=True)
class View:
    """A named tensor of the file: a strided window into one region."""

    name: str
    region: int
    """Index into SourceFile.regions."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements of dtype."""
    offset: int
    """In elements of dtype, from the region's first byte."""


@dataclass(frozen=True)
class Crc32:
    """A CRC-32 of file[offset:offset+nbytes] that stands, little-endian, at each file offset of `at`."""

    offset: int
    nbytes: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class Moments:
    """What the Adam update of one parameter needs. `exp_avg`, `exp_avg_sq` and `weight` are region names of one file.

    `weight` is None where the weight is unknown or stands in another file of the directory (`param` still names it).
    `lr`, `weight_decay` and `step` are None where the file does not say.
    """

    param: str | None
    exp_avg: str
    exp_avg_sq: str
    weight: str | None
    beta1: float
    beta2: float
    eps: float
    lr: float | None
    weight_decay: float | None
    step: float | None


@dataclass(frozen=True)
class SourceFile:
    """One file of a checkpoint, located."""

    path: str
    """Relative posix path; for a single-file source its base name."""
    nbytes: int
    mode: int
    """Permission bits."""
    layout: str
    """"torch_zip", "safetensors" or "opaque"."""
    regions: tuple[Region, ...] = ()
    """Sorted by offset, disjoint."""
    views: tuple[View, ...] = ()
    crcs: tuple[Crc32, ...] = ()
    moments: tuple[Moments, ...] = ()
    same_as: str | None = None
    """Path of an earlier file of the directory that this one is a hard link to; regions are then given only there."""
    note: str | None = None
    """Why a file of a directory that looked like a checkpoint is carried as opaque bytes."""
    identity: Identity = IN_MEMORY
    """Of the file when it was located, for whoever reads it later."""


@dataclass(frozen=True)
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
    folders: tuple[Folder, ...] = ()
    """The directory itself and all subdirectories, sorted by path, empty ones included; nothing for a single file."""

    @property
    def directories(self) -> tuple[str, ...]:
        """Relative posix paths of all subdirectories."""
        return tuple(folder.path for folder in self.folders if folder.path)
