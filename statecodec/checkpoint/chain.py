"""Chains: a compressed checkpoint that stores what changed since another one, its base, which lies beside it.

A link names its base by file name and by the digest of the base's manifest, which covers every checksum in it: another
file under that name is refused. Links refer to links, up to MAX_LINKS of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from statecodec.checkpoint.base import TensorInfo
from statecodec.checkpoint.document import MAX_LINKS, BaseFile
from statecodec.checkpoint.sniff import is_compressed
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs import Codec
from statecodec.codecs.chunking import Chunk
from statecodec.errors import FormatError, UsageError
from statecodec.format.index import INDEX_SUFFIX
from statecodec.format.mentions import mentions

if TYPE_CHECKING:
    from torch import Tensor


class BaseCheckpoint:
    """An open base checkpoint, from which a link takes parts and values. Thread-safe, as readers are."""

    def __init__(self, path: str | Path, target: Path) -> None:
        """Open the base of a link that will be written to `target`. Raises UsageError, FormatError."""
        path = Path(path)
        if not path.exists() or not is_compressed(path):
            raise UsageError(f"base {path}: not a compressed checkpoint; a chain starts at one")
        if path.absolute().parent.resolve() != target.absolute().parent.resolve():
            raise UsageError(f"base {path}: a link lies beside its base, but {target} is in another folder")
        self.stored = StoredCheckpoint.open(path)
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

    def close(self) -> None:
        """Close the base."""
        self.stored.close()

    def index(self, tensor: TensorInfo) -> int | None:
        """The index of the base's item of equal name, shape and dtype; None if there is none."""
        stored = self.stored.tensors.get(tensor.name)
        alike = stored is not None and (stored.shape, stored.dtype) == (tensor.shape, tensor.dtype)
        return stored.index if stored is not None and alike else None

    def parts(self, tensor: TensorInfo, codec: Codec, chunk: Chunk) -> Mapping[str, Tensor]:
        """The parts that a chunk of the base's tensor has under a codec. Raises FormatError if it has none."""
        index = self.index(tensor)
        assert index is not None  # `linked` chooses changes only of tensors that the base has
        return self.stored.parts_under(codec, index, chunk)

    def values(self, tensor: TensorInfo, chunk: Chunk) -> Tensor:
        """The base's decoded values of a chunk's elements, in the chunk's shape."""
        index = self.index(tensor)
        assert index is not None
        return self.stored.decode_range(index, chunk.start, chunk.stop).view(chunk.shape)


def _chain(stored: StoredCheckpoint) -> Iterator[StoredCheckpoint]:
    """A checkpoint and everything it builds on."""
    yield stored
    while stored.document.base is not None:
        stored = stored.base
        yield stored


def refuse_base(target: Path) -> None:
    """Refuse to replace a file that is the base of another file in its folder. Raises UsageError."""
    names = (target.name, target.name + ".index.json")
    if not any((path := target.with_name(name)).is_file() and is_compressed(path) for name in names):
        return
    others = [p for p in target.parent.glob("*.safetensors*") if p.is_file() and p.name not in names]
    links = sorted(p.name for p in others if is_compressed(p) and _builds_on(p, names))
    if links:
        raise UsageError(
            f"{target} is the base of {', '.join(links[:3])}{' and others' if len(links) > 3 else ''}, unreadable "
            "without it. Write to another name, or delete those, or make them stand alone with `convert`"
        )


def _builds_on(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a compressed checkpoint names one of these files as its base.

    Most files do not contain the names at all, which is found out first, because it is cheap.
    """
    try:
        if not path.name.endswith(INDEX_SUFFIX) and not mentions(path, names):
            return False
        with StoredCheckpoint.open(path) as stored:
            return stored.document.base is not None and stored.document.base.name in names
    except FormatError:
        return False  # damaged, or a shard: it cannot be read as a checkpoint
