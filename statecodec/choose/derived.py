"""Stores tensors beside others that they are near: 16-bit weights beside masters, averages beside their weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final

from statecodec import codecs
from statecodec.buffers import memory
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.averages import followed
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.presets import MIN_NUMEL
from statecodec.choose.samples import sample
from statecodec.choose.since_base import packed_size
from statecodec.codecs import Change, Codec, Encoding
from statecodec.codecs.chunking import Chunk
from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from statecodec.errors import UnencodableValues
from statecodec.format import Packing

_NARROW: Final = (BFLOAT16, FLOAT16)
_ELEMENTWISE: Final = (codecs.Raw, codecs.Uniform, codecs.Split, codecs.Logarithmic, codecs.Cast)
_SAMPLE: Final = 1 << 14
_WORTH: Final = 0.97  # of a tensor's own size: above it, depending on another tensor is not worth it


Place = tuple[str, tuple[int, ...]]
"""A folder and a shape."""


def derived(
    source: SourceCheckpoint, choices: Choices, packing: Packing, only: Container[str] | None = None
) -> Choices:
    """The same choices, with tensors stored beside others where samples of both pack smaller that way.

    With packing `none` nothing changes: nothing would be smaller, and a file that is mapped would not hold the tensor.
    `only`: the names that are looked at, where not all are.
    """
    beside: dict[str, Choice] = {}
    for item, others in followers(source) if packing.method != "none" else ():
        if choices[item.name].settled or (only is not None and item.name not in only):
            continue
        for other in others:
            chosen = _beside(choices[item.name], item, other)
            if chosen is None or other.name in beside or not _is_elementwise(choices[other.name]):
                continue
            if _is_smaller(source, item, other, choices, chosen.codec, packing):
                beside[item.name] = chosen
                break
    return choices.updated(beside)


def followers(source: SourceCheckpoint) -> Iterator[tuple[SourceItem, Sequence[SourceItem]]]:
    """Each tensor that may be stored beside another one, and that other one."""
    yield from _rounded(source)
    weights = followed(source)
    yield from ((item, [weights[item.name]]) for item in source.items if item.name in weights)


def _rounded(source: SourceCheckpoint) -> Iterator[tuple[SourceItem, Sequence[SourceItem]]]:
    """16-bit weights, and the masters that each may be a copy of: of the same folder and shape, and of the same name.

    A master without a name (which parameter is where in Megatron's flat buffers no file says) is one that rounds to the
    weight wherever samples of both look. A wrong one would cost size, as what is missing to the weight is stored.
    """
    named: dict[tuple[str, str, tuple[int, ...]], list[SourceItem]] = defaultdict(list)
    nameless: dict[Place, list[SourceItem]] = defaultdict(list)
    for item in source.items:
        if item.role == "master" and item.dtype == FLOAT32 and item.numel >= MIN_NUMEL:
            folder = _folder(source, item)
            if item.param is None:
                nameless[folder, item.shape].append(item)
            else:
                named[folder, item.param, item.shape].append(item)
    rounded = _Rounded(source, nameless)
    for item in source.items:
        if item.role == "weight" and item.dtype in _NARROW and item.param is not None and item.numel >= MIN_NUMEL:
            folder = _folder(source, item)
            candidates = named.get((folder, item.param, item.shape)) or rounded.like(item, (folder, item.shape))
            if candidates and not item.bytes_only:
                yield item, candidates


class _Rounded:
    """Samples of masters as a 16-bit dtype has them, made for the shapes and dtypes that are asked for."""

    def __init__(
        self, source: SourceCheckpoint, masters: Mapping[tuple[str, tuple[int, ...]], list[SourceItem]]
    ) -> None:
        self._source, self._masters = source, masters
        self._by_sample: dict[tuple[Place, DType], dict[bytes, list[SourceItem]]] = {}

    def like(self, weight: SourceItem, place: Place) -> list[SourceItem]:
        """The masters of a folder and shape whose samples round to those of the weight."""
        if place not in self._masters:
            return []
        key = (place, weight.dtype)
        if key not in self._by_sample:
            self._by_sample[key] = defaultdict(list)
            for master in self._masters[place]:
                values = sample(self._source, master).to(weight.dtype.torch)
                self._by_sample[key][bytes(memory(values))].append(master)
        return self._by_sample[key].get(bytes(memory(sample(self._source, weight))), [])


def _folder(source: SourceCheckpoint, item: SourceItem) -> str:
    return str(PurePosixPath(source.located.files[item.file].path).parent)


def _is_elementwise(choice: Choice) -> bool:
    """Whether a piece of the tensor is decoded from nothing but its own codes: not from a base."""
    return isinstance(choice.codec, _ELEMENTWISE) and choice.encoding.change is not Change.VALUES


def _beside(choice: Choice, item: SourceItem, other: SourceItem) -> Choice | None:
    """The choice that stores a tensor beside the other; None if there is none that is as near as this one."""
    codec: Codec
    if isinstance(choice.codec, codecs.Uniform):
        codec = codecs.Following(choice.codec.step)
    elif item.dtype in _NARROW and choice.exact:
        codec = codecs.Ulps()
    else:
        return None
    (role,) = codec.needs
    verb = "goes after" if item.role == "ema" else "follows from"
    return replace(
        choice,
        encoding=Encoding(codec),
        reason=f"it {verb} {other.name}",
        companions={role: other.name},
        otherwise=choice.codec,
    )


def _is_smaller(
    source: SourceCheckpoint,
    item: SourceItem,
    other: SourceItem,
    choices: Mapping[str, Choice],
    codec: Codec,
    packing: Packing,
) -> bool:
    """Whether two samples of a tensor pack smaller beside the other, as the reader will have it."""
    (role,) = codec.needs
    now, before = choices[item.name].codec, choices[other.name].codec
    alone = beside = 0
    for chunk in _samples(item.numel):
        x = source.chunk(item, chunk)
        try:
            decoded = before.encode(source.chunk(other, chunk)).decode()
            parts = codec.encode(x, companions={role: decoded}).parts
            alone += packed_size(now.encode(x).parts, packing)
        except UnencodableValues:
            return False
        beside += packed_size(parts, packing)
    return beside < _WORTH * alone


def _samples(numel: int) -> Iterator[Chunk]:
    """Pieces from the beginning and the middle of a tensor."""
    size = min(numel, _SAMPLE)
    for start in {0, (numel - size) // 2}:
        yield Chunk(start, start + size, (1, size))
