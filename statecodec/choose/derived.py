"""Which tensors need not be stored again: bf16 and fp16 weights whose fp32 master is in the same checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final

from statecodec import codecs
from statecodec.checkpoint.source import SourceCheckpoint, SourceItem
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.presets import MIN_NUMEL
from statecodec.choose.since_base import packed_size
from statecodec.codecs import Change, Codec, Encoding
from statecodec.codecs.chunking import Chunk
from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32
from statecodec.errors import UnencodableValues
from statecodec.format import Packing

_NARROW: Final = (BFLOAT16, FLOAT16)
_MASTERS: Final = (codecs.Raw, codecs.Uniform, codecs.Split, codecs.Logarithmic, codecs.Cast)  # element by element
_SAMPLE: Final = 1 << 14
_WORTH: Final = 0.9  # of what a weight takes on its own: above that it is not worth depending on another tensor


def derived(
    source: SourceCheckpoint, choices: Choices, packing: Packing, only: Container[str] | None = None
) -> Choices:
    """The same choices, with weights stored beside their masters where samples of both pack smaller that way.

    Unpacked, nothing would be smaller, and a file that is mapped would not hold the weights: nothing changes.
    `only`: the names that are looked at, where not all are.
    """
    beside_masters = {}
    for item, masters in followers(source) if packing.method != "none" else ():
        if choices[item.name].settled or (only is not None and item.name not in only):
            continue
        for master in masters:
            codec = choices[master.name].codec
            if choices[master.name].encoding.change is Change.VALUES:  # what it decodes to, the base decides
                continue
            if isinstance(codec, _MASTERS) and _is_smaller(source, item, master, codec, packing):
                beside_masters[item.name] = _beside(choices[item.name], master)
                break
    return choices.updated(beside_masters)


def followers(source: SourceCheckpoint) -> Iterator[tuple[SourceItem, Sequence[SourceItem]]]:
    """16-bit weights, and the masters that each may be a copy of: of the same folder, parameter and shape."""
    masters: dict[tuple[str, str, tuple[int, ...]], list[SourceItem]] = defaultdict(list)
    for item in source.items:
        if item.role == "master" and item.dtype == FLOAT32 and item.param is not None:
            masters[_folder(source, item), item.param, item.shape].append(item)
    for item in source.items:
        if item.role == "weight" and item.dtype in _NARROW and item.param is not None and item.numel >= MIN_NUMEL:
            candidates = masters.get((_folder(source, item), item.param, item.shape))
            if candidates and not item.bytes_only:
                yield item, candidates


def _folder(source: SourceCheckpoint, item: SourceItem) -> str:
    return str(PurePosixPath(source.located.files[item.file].path).parent)


def _beside(choice: Choice, master: SourceItem) -> Choice:
    reason = f"it follows from {master.name}"
    return replace(choice, encoding=Encoding(codecs.Ulps()), reason=reason, companions={"master": master.name},
                   otherwise=choice.codec)  # fmt: skip


def _is_smaller(source: SourceCheckpoint, item: SourceItem, master: SourceItem, codec: Codec, packing: Packing) -> bool:
    """Whether two samples of a weight pack smaller beside the master, as the reader will have it."""
    alone = beside = 0
    for chunk in _samples(item.numel):
        x = source.chunk(item, chunk)
        try:
            decoded = codec.encode(source.chunk(master, chunk)).decode()
            parts = codecs.Ulps().encode(x, companions={"master": decoded}).parts
        except UnencodableValues:
            return False
        alone, beside = alone + packed_size({"data": x}, packing), beside + packed_size(parts, packing)
    return beside < _WORTH * alone


def _samples(numel: int) -> Iterator[Chunk]:
    """Pieces from the beginning and the middle of a tensor."""
    size = min(numel, _SAMPLE)
    for start in {0, (numel - size) // 2}:
        yield Chunk(start, start + size, (1, size))
