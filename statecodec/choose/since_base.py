"""Which tensors of a link of a chain are stored as what changed since the base: those that get smaller by it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from statecodec import codecs
from statecodec.buffers import Pool
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.choices import Choices
from statecodec.choose.low_rank import is_low_rank
from statecodec.codecs import Change, Codec, Encoding
from statecodec.codecs.changes import subtract_parts
from statecodec.codecs.chunking import Chunk, chunks
from statecodec.errors import FormatError, UnencodableValues, UsageError
from statecodec.format import StoredItem
from statecodec.format.packing import Packing, encode_record

if TYPE_CHECKING:
    from torch import Tensor

_WORTH = 0.98  # a change must pack to less than this share of the parts' packed size


def linked(
    source: SourceCheckpoint,
    choices: Choices,
    base: BaseCheckpoint | None,
    packing: Packing,
    only: Container[str] | None = None,
) -> Choices:
    """The same choices, with tensors stored as a change since the base where that is smaller.

    That is judged on each item's first and middle chunk. `only`: the names that are looked at, where not all are.

    Raises UsageError for a rule's change whose base lacks the tensor.
    """
    if base is None:
        return choices
    changed = {}
    for item in source.items:
        choice = choices[item.name]
        if choice.encoding.change is not None:
            _require(item, base)
        elif only is None or item.name in only:
            change = _smallest(source, item, choice.codec, base, packing.settled(is_low_rank(item)))
            changed[item.name] = replace(choice, encoding=Encoding(choice.codec, change))
    return replace(choices, by_name={**choices.by_name, **changed})


def standing_alone(choices: Choices, base: BaseCheckpoint | None) -> Choices:
    """The same choices, with a note if there is a base and none of them needs it."""
    if base is None or choices.uses_base:
        return choices
    return choices.noted(f"nothing is smaller as a change since {base.file.name}: this file stands alone")


def _require(item: SourceItem, base: BaseCheckpoint) -> None:
    if base.index(item) is None:
        raise UsageError(f"{item.name}: {base.file.name} has no such tensor to take the change from")


def _smallest(
    source: SourceCheckpoint, item: SourceItem, codec: Codec, base: BaseCheckpoint, packing: Packing
) -> Change | None:
    """A change of the codec's parts, if it packs smaller than they: judged on the first and the middle chunk."""
    index = base.index(item)
    if index is None or not item.numel or packing.method == "none":
        return None
    stored = base.stored.reader.items[index]
    pieces = list(chunks(codec, item.shape, item.dtype))
    if not _can_change(codec, stored, pieces):
        return None
    before = after = 0
    for chunk in first_and_middle(pieces):
        try:
            parts = codec.encode(source.chunk(item, chunk)).parts
            changed = subtract_parts(parts, base.parts(item, codec, chunk))
        except (UnencodableValues, FormatError):
            return None
        before += packed_size(parts, packing)
        after += packed_size(changed, packing)
    return Change.PARTS if after < _WORTH * before else None


def first_and_middle(pieces: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that are encoded to tell how large all of them are."""
    return [pieces[number] for number in {0, len(pieces) // 2}]


def _can_change(codec: Codec, stored: StoredItem, pieces: Sequence[Chunk]) -> bool:
    """Whether the base has parts to subtract: those of the same codec, cut alike; for a grid, those of any codec."""
    if isinstance(codec, codecs.Uniform):
        return True  # grids differ: the base's values are put on this one
    can = isinstance(codec, codecs.Raw | codecs.Cast | codecs.Split | codecs.Companded | codecs.Logarithmic)
    alike = stored.encoding.standalone == codec
    return can and alike and _cut(pieces) == _cut(stored.chunks)


def _cut(pieces: Sequence[Chunk]) -> list[tuple[int, tuple[int, ...]]]:
    return [(c.start, tuple(c.shape)) for c in pieces]


def packed_size(parts: Mapping[str, Tensor], packing: Packing) -> int:
    """Bytes of the record that holds these parts."""
    return encode_record([p.contiguous() for p in parts.values()], packing, Pool())[1]
