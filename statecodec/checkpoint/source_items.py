"""What is stored of a source: each region of its files as an item, and each file's skeleton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from statecodec.checkpoint.base import TensorInfo
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.dtypes import UINT8
from statecodec.layouts import LogicalTensor, Region, Source, StatePart
from statecodec.names import shown


@dataclass(frozen=True)
class SourceItem(TensorInfo):
    """A tensor to store: a region of a source file, or (`region` is None) all of that file that no region covers."""

    file: int = 0
    region: Region | None = None
    state: StatePart | None = None

    @property
    def bytes_only(self) -> bool:
        """Whether it may only be stored bit for bit: it is no tensor, or several different windows look at it."""
        return self.region is None or self.region.lossless


def source_items(source: Source, skeletons: Sequence[Skeleton]) -> Iterator[SourceItem]:
    """What will be stored, in order: of each file its skeleton, then its regions."""
    taken: dict[str, int] = {}
    index = 0
    owners = _owners(source)
    for number, (file, skeleton) in enumerate(zip(source.files, skeletons, strict=True)):
        if file.same_as is not None:
            continue
        if skeleton.nbytes:
            role = "skeleton" if file.regions else "file"
            name = _unique(f"{shown(file.path)}:{role}" if source.is_directory else role, taken)
            yield SourceItem(name, role, None, (skeleton.nbytes,), UINT8, index, number)
            index += 1
        for region, (tensor, piece) in zip(file.regions, owners[file.path], strict=True):
            name = _unique(tensor.name if len(tensor.pieces) == 1 else f"{tensor.name}@{piece}", taken)
            shape, dtype, state = region.shape, region.dtype, tensor.state
            yield SourceItem(name, tensor.role, tensor.param, shape, dtype, index, number, region, state)
            index += 1


def _owners(source: Source) -> dict[str, list[tuple[LogicalTensor, int]]]:
    """For each file and each of its regions the tensor that the region holds a piece of, and that piece's number."""
    by_file: dict[str, list[tuple[int, LogicalTensor, int]]] = {file.path: [] for file in source.files}
    for tensor in source.tensors:
        for number, piece in enumerate(tensor.pieces):
            by_file[piece.file].append((piece.region, tensor, number))
    return {
        path: [(tensor, number) for _, tensor, number in sorted(pieces, key=itemgetter(0))]
        for path, pieces in by_file.items()
    }


def _unique(name: str, taken: dict[str, int]) -> str:
    """A stored name that is still free: tensors may be called anything, and names of parts append `/part`."""
    base = name.replace("/", "|") or "tensor"
    base = f"tensor.{base}" if base.startswith("__") else base
    candidate = base
    while candidate in taken:
        taken[base] += 1
        candidate = f"{base}~{taken[base]}"
    taken[candidate] = 1
    return candidate
