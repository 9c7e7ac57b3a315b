"""Chains: a compressed checkpoint that stores what changed since another one, its base, which lies beside it.

A link names its base by file name and by the digest of the base's manifest, which covers every checksum in it: another
file under that name is refused. Links refer to links, up to MAX_LINKS of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from statecodec import codecs
from statecodec.buffers import Pool
from statecodec.checkpoint.document import MAX_LINKS, BaseFile
from statecodec.checkpoint.source_files import SourceFiles
from statecodec.checkpoint.stored import Stored
from statecodec.checkpoint.tensor_sets import is_compressed
from statecodec.choose.plan import Plan, PlannedItem, with_codec
from statecodec.codecs import Codec, Delta, Residual
from statecodec.codecs.chunking import Chunk, chunks
from statecodec.errors import CorruptFile, FormatError, UnencodableValues, UsageError
from statecodec.format.packing import Packing, encode_record
from statecodec.verbs.paths import INDEX_SUFFIX

_WORTH = 0.98  # a delta must pack below this share of what the parts alone pack to


class Base:
    """An open base checkpoint, and what a link takes from it. Thread-safe, as readers are."""

    def __init__(self, path: str | Path, target: Path) -> None:
        """Open the base of a link that will be written to `target`. Raises UsageError, FormatError."""
        path = Path(path)
        if not path.exists() or not is_compressed(path):
            raise UsageError(f"base {path}: not a compressed checkpoint; a chain starts at one")
        if path.absolute().parent.resolve() != target.absolute().parent.resolve():
            raise UsageError(f"base {path}: a link lies beside its base, but {target} is in another folder")
        self.stored = Stored.open(path)
        before = self.stored.document.base.length if self.stored.document.base else 0
        try:
            if any(earlier.path.absolute() == target.absolute() for earlier in _chain(self.stored)):
                raise UsageError(
                    f"{target} is what base {path} builds on, or the base itself: writing it breaks the chain"
                )
            if before + 1 > MAX_LINKS:
                raise UsageError(
                    f"base {path} is link {before} of a chain, and {MAX_LINKS} are the most that a reader follows: "
                    "start again with a checkpoint of its own, or take an earlier base"
                )
        except BaseException:
            self.close()
            raise
        self.file = BaseFile(path.name, self.stored.reader.digest, before + 1)
        self._index = {item.name: i for i, item in enumerate(self.stored.reader.items)}

    def close(self) -> None:
        """Close the base."""
        self.stored.close()

    def index(self, planned: PlannedItem) -> int | None:
        """The base's item that is the same tensor, if it has one: equal name, shape and dtype."""
        index = self._index.get(planned.item.name)
        if index is None:
            return None
        found = self.stored.reader.items[index]
        alike = (found.shape, found.dtype) == (planned.item.shape, planned.item.dtype)
        return index if alike else None

    def parts(self, planned: PlannedItem, chunk: Chunk) -> Mapping[str, Tensor]:
        """The base's parts of a chunk, as they would stand in a file of their own."""
        index = self.index(planned)
        assert index is not None  # only tensors the base has are linked
        return self.stored.parts(index, self.stored.chunk_at(index, chunk))[1]

    def values(self, planned: PlannedItem, chunk: Chunk) -> Tensor:
        """The base's decoded values of a chunk's elements, in the chunk's shape."""
        index = self.index(planned)
        assert index is not None
        return self.stored.decode_range(index, chunk.start, chunk.stop).view(chunk.shape)


def _chain(stored: Stored) -> Iterator[Stored]:
    """A checkpoint and everything it builds on."""
    yield stored
    while stored.document.base is not None:
        stored = stored.base
        yield stored


@dataclass(frozen=True)
class Linked:
    """A plan whose items may be stored as changes; `used` is False if none of them is."""

    plan: Plan
    used: bool


def link(plan: Plan, base: Base, files: SourceFiles, packing: Packing) -> Linked:
    """Store as a change whatever that makes smaller, judged on the first and the middle chunk of each item.

    Raises UsageError for a residual whose base lacks the tensor.
    """
    items = tuple(_linked(planned, plan, base, files, packing) for planned in plan.items)
    return Linked(replace(plan, items=items), any(isinstance(p.item.codec, codecs.Based) for p in items))


def _linked(planned: PlannedItem, plan: Plan, base: Base, files: SourceFiles, packing: Packing) -> PlannedItem:
    codec, index = planned.item.codec, base.index(planned)
    if isinstance(codec, Residual):
        if index is None:
            raise UsageError(f"{planned.item.name}: {base.file.name} has no such tensor to take the residual from")
        return planned
    if index is None or not math.prod(planned.item.shape) or not _can_change(codec):
        return planned
    if codecs.standalone(base.stored.reader.items[index].codec) != codec:
        return planned
    delta = Delta(codec)
    own = list(chunks(codec, planned.item.shape, planned.item.dtype))
    if [c.start for c in own] != [c.start for c in base.stored.reader.items[index].chunks]:
        return planned
    before = after = 0
    for chunk in {0: own[0], len(own) // 2: own[len(own) // 2]}.values():
        x = files.read(plan, planned, chunk)
        try:
            parts = codec.encode(x).parts
        except UnencodableValues:
            return planned
        before += _packed(parts, packing)
        after += _packed(delta.difference(parts, base.parts(planned, chunk)), packing)
    return with_codec(planned, delta) if after < _WORTH * before else planned


def _can_change(codec: Codec) -> bool:
    return isinstance(codec, codecs.Raw | codecs.Cast | codecs.Split | codecs.Companded)


def _packed(parts: Mapping[str, Tensor], packing: Packing) -> int:
    """Bytes of a record; without packing nothing is gained by a change."""
    if packing.method == "none":
        return sum(p.nbytes for p in parts.values())
    return encode_record([p.contiguous() for p in parts.values()], packing, Pool())[1]


def refuse_base(target: Path) -> None:
    """Raise UsageError if another file in the folder stores what changed since the file `target`, by its name."""
    names = (target.name, target.name + INDEX_SUFFIX)
    if not any((path := target.with_name(name)).is_file() and is_compressed(path) for name in names):
        return
    others = [p for p in target.parent.glob("*.safetensors*") if p.is_file() and p.name not in names]
    links = sorted(p.name for p in others if is_compressed(p) and _base_name(p) in names)
    if links:
        raise UsageError(
            f"{target} is the base of {', '.join(links[:3])}{' and others' if len(links) > 3 else ''}, unreadable "
            "without it. Write to another name, or delete those, or make them stand alone with `convert`"
        )


def _base_name(path: Path) -> str | None:
    try:
        with Stored.open(path) as stored:
            return stored.document.base.name if stored.document.base else None
    except FormatError:
        return None  # damaged, or a shard: nothing that can be read now


def open_base(stored: Stored) -> Stored:
    """The base of an open link, checked. Raises FormatError if it is not there, CorruptFile if it is another file."""
    base = stored.document.base
    assert base is not None
    path = stored.path.parent / base.name
    if not path.exists():
        raise FormatError(
            f"{stored.path} stores what changed since {base.name}, which must lie beside it and does not; the chain "
            f"has {base.length} earlier file{'s' if base.length > 1 else ''}"
        )
    opened = Stored.open(path)
    if opened.reader.digest != base.digest:
        opened.close()
        raise CorruptFile(f"{path} is not the file that {stored.path.name} was made from: its digest is another")
    before = opened.document.base.length if opened.document.base else 0
    if before != base.length - 1:
        opened.close()
        raise FormatError(f"{stored.path} is said to be link {base.length} of a chain, its base {before}")
    return opened


__all__ = ["MAX_LINKS", "Base", "Linked", "link", "open_base", "refuse_base"]
