"""Stores tensors beside others that they are near: 16-bit weights beside masters, averages beside their weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from statecodec import codecs
from statecodec.buffers import memory
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.averages import followed
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.presets import is_small
from statecodec.choose.samples import sample
from statecodec.choose.since_base import first_and_middle, packed_size
from statecodec.codecs import Change, Codec, Encoding
from statecodec.codecs.changes import subtract_parts
from statecodec.codecs.chunking import Chunk, chunks
from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from statecodec.errors import FormatError, UnencodableValues
from statecodec.format import Packing

if TYPE_CHECKING:
    from torch import Tensor

_NARROW: Final = (BFLOAT16, FLOAT16)
_ELEMENTWISE: Final = (codecs.Raw, codecs.Uniform, codecs.Split, codecs.Logarithmic, codecs.Cast)
_SAMPLE: Final = 1 << 14
_WORTH: Final = 0.97  # of a tensor's own size: above it, depending on another tensor is not worth it


Place = tuple[str, tuple[int, ...]]
"""A folder and a shape."""


def derived(
    source: SourceCheckpoint,
    choices: Choices,
    base: BaseCheckpoint | None,
    packing: Packing,
    only: Container[str] | None = None,
) -> Choices:
    """The same choices, with tensors stored beside others where samples of both pack smaller that way.

    Of a link of a chain: smaller than what changed since the base, where that is what was chosen. With packing `none`
    nothing changes: nothing would be smaller, and a file that is mapped would not hold the tensor. `only`: the names
    that are looked at, where not all are.
    """
    sizes = _Sizes(source, choices, base, packing)
    beside: dict[str, Choice] = {}
    for item, others in followers(source) if packing.method != "none" else ():
        if choices[item.name].settled or (only is not None and item.name not in only):
            continue
        for other in others:
            chosen = _beside(choices[item.name], item, other)
            if chosen is None or other.name in beside or not _is_elementwise(choices[other.name]):
                continue
            if sizes.are_smaller(item, other, chosen.codec):
                beside[item.name] = chosen
                break
    return choices.updated(beside)


def followers(source: SourceCheckpoint) -> Iterator[tuple[SourceItem, Sequence[SourceItem]]]:
    """Each tensor that may be stored beside another one, and that other one."""
    yield from _rounded(source)
    for average, weight in followed(source).items():
        yield source.items[source.tensors[average].index], [source.items[source.tensors[weight].index]]


def _rounded(source: SourceCheckpoint) -> Iterator[tuple[SourceItem, Sequence[SourceItem]]]:
    """16-bit weights, and the masters that each may be a copy of: of the same folder and shape, and of the same name.

    A master without a name (which parameter is where in Megatron's flat buffers no file says) is one that rounds to the
    weight wherever samples of both look. A wrong one would cost size, as what is missing to the weight is stored.
    """
    named: dict[tuple[str, str, tuple[int, ...]], list[SourceItem]] = defaultdict(list)
    nameless: dict[Place, list[SourceItem]] = defaultdict(list)
    for item in source.items:
        if item.role == "master" and item.dtype == FLOAT32 and not is_small(item.shape):
            folder = _folder(source, item)
            if item.param is None:
                nameless[folder, item.shape].append(item)
            else:
                named[folder, item.param, item.shape].append(item)
    rounded = _Rounded(source, nameless)
    for item in source.items:
        if item.role == "weight" and item.dtype in _NARROW and item.param is not None and not is_small(item.shape):
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


@dataclass(frozen=True)
class _Sizes:
    """What samples of a tensor pack to."""

    source: SourceCheckpoint
    choices: Choices
    base: BaseCheckpoint | None
    packing: Packing

    def are_smaller(self, item: SourceItem, other: SourceItem, codec: Codec) -> bool:
        """Whether a tensor is smaller in this codec, beside the other as the reader will have it, than as chosen."""
        alone = beside = 0
        try:
            for chunk in self._samples(item):
                x = self.source.chunk(item, chunk)
                alone += packed_size(self._chosen(item, chunk, x), self.packing)
                beside += packed_size(self._beside(other, codec, chunk, x), self.packing)
        except (UnencodableValues, FormatError):
            return False
        return beside < _WORTH * alone

    def _samples(self, item: SourceItem) -> list[Chunk]:
        """Pieces from the beginning and the middle; whole chunks where they are compared with the base's."""
        choice = self.choices[item.name]
        if choice.encoding.change is not None:
            return first_and_middle(list(chunks(choice.codec, item.shape, item.dtype)))
        size = min(item.numel, _SAMPLE)
        return [Chunk(start, start + size, (1, size)) for start in {0, (item.numel - size) // 2}]

    def _chosen(self, item: SourceItem, chunk: Chunk, x: Tensor) -> Mapping[str, Tensor]:
        choice = self.choices[item.name]
        parts = choice.codec.encode(x).parts
        if choice.encoding.change is None or self.base is None:
            return parts
        return subtract_parts(parts, self.base.parts(item, choice.codec, chunk))

    def _beside(self, other: SourceItem, codec: Codec, chunk: Chunk, x: Tensor) -> Mapping[str, Tensor]:
        (role,) = codec.needs
        decoded = self.choices[other.name].codec.encode(self.source.chunk(other, chunk)).decode()
        return codec.encode(x, companions={role: decoded}).parts
