"""Walking a parameter and its encoded states together, a cache-sized tile at a time.

A tile is a range of rows (or, in a very long row, a range of columns cut where every codec can be cut). The parts of a
tile are views into the parts of the whole: encoding tile by tile writes the same bytes as encoding the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from statecodec import dtypes, kernels
from statecodec.codecs import Codec, EncodedTensor, Folded, Raw, rows_cols
from statecodec.codecs.parts import inner_parts

# Elements of one tile: weight, gradient and two moments in fp32 stay within a core's second-level cache or just
# outside.
TILE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Tile:
    """Elements start..stop of the flattened parameter, `rows` x `cols`."""

    start: int
    stop: int
    rows: int
    cols: int


PartSlice: TypeAlias = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class Access:
    """How one state is decoded within tiles.

    Args:
        codec: Its codec; of a folded state the inner one.
        block: How many elements a value stands for; 0 if it is not folded.
        slices: Where its parts lie, for every tile.
        shapes: The shape of its values in every tile.
    """

    codec: Codec
    block: int
    slices: tuple[dict[str, PartSlice], ...]
    shapes: tuple[tuple[int, int], ...]


def tiles(shape: tuple[int, ...], align: int, target: int = TILE_ELEMENTS) -> tuple[Tile, ...]:
    """Cut a tensor of this shape. `align` is the common cut inside a row."""
    rows, cols = rows_cols(shape)
    if cols <= target or cols <= align:
        height = max(1, target // max(cols, 1))
        bounds = [(r, min(r + height, rows)) for r in range(0, rows, height)]
        return tuple(Tile(a * cols, b * cols, b - a, cols) for a, b in bounds)
    width = max(align, target // align * align)
    return tuple(
        Tile(r * cols + c, r * cols + min(c + width, cols), 1, min(c + width, cols) - c)
        for r in range(rows)
        for c in range(0, cols, width)
    )


def access(codec: Codec, walk: tuple[Tile, ...], dtype: torch.dtype) -> Access:
    """Where the parts of a state with this codec lie, for every tile. A folded state is reached in its folded shape."""
    folded = codec if isinstance(codec, Folded) else None
    inner = folded.inner if folded else codec
    offsets: dict[str, int] = {}
    slices, shapes = [], []
    for tile in walk:
        shape = (tile.rows, -(-tile.cols // folded.block) if folded else tile.cols)
        here: dict[str, PartSlice] = {}
        for name, spec in inner.parts(shape, dtypes.of(dtype)).items():
            begin = offsets.get(name, 0)
            offsets[name] = begin + spec.numel
            here[name] = (begin, begin + spec.numel, spec.shape)
        slices.append(here)
        shapes.append(shape)
    return Access(inner, folded.block if folded else 0, tuple(slices), tuple(shapes))


def common_align(codecs: Mapping[str, Codec], shape: tuple[int, ...]) -> int:
    """The smallest cut inside a row that every codec takes; a whole row if one of them takes none."""
    aligns = [codec.align(shape) for codec in codecs.values()]
    whole = max(1, rows_cols(shape)[1])
    return math.lcm(1, *(whole if a is None else a for a in aligns))


class TileBuffers:
    """Buffers by name, grown on demand and used again for every tile.

    New ones each time would cost more in page faults than the arithmetic takes.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; it shares memory with earlier ones of the same name."""
        size = math.prod(shape)
        key = (name, dtype, device)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            flat = self._flat[key] = torch.empty(size, dtype=dtype, device=device)
        return flat[:size].view(shape)


class StateTile:
    """One state within one tile: `values` are decoded, `store()` encodes what became of them."""

    def __init__(
        self, name: str, state: EncodedTensor, how: Access, at: int, scratch: TileBuffers, backend: kernels.Backend
    ) -> None:
        source = inner_parts(state.parts, "mean") if how.block else state.parts
        self._parts = {k: source[k].view(-1)[a:b].view(shape) for k, (a, b, shape) in how.slices[at].items()}
        self._codec, self._block, self._backend, self._dtype = how.codec, how.block, backend, state.dtype
        shape = how.shapes[at]
        if isinstance(how.codec, Raw):
            self.values = self._parts["data"]  # stepped in place
        else:
            self.values = scratch.take(name, shape, state.dtype, state.device)
            how.codec.decode_into(self._parts, self.values, backend)

    def store(self) -> None:
        """Encode the values into the state."""
        if not isinstance(self._codec, Raw):
            self._codec.encode_into(self.values, self._parts, self._backend)

    def width(self, unit: int) -> int:
        """How many values belong to `unit` neighbouring elements of a row."""
        return -(-unit // self._block) if self._block else unit

    def parts_by_unit(self, unit: int) -> list[tuple[Tensor, int]]:
        """The stored parts of this tile, each with how many of its columns belong to `unit` elements of a row."""
        widths = self._codec.parts((1, self.width(unit)), dtypes.of(self._dtype))
        return [(part, widths[name].shape[-1]) for name, part in self._parts.items()]
