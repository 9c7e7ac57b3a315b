"""Measuring, on samples of a checkpoint's tensors, what each candidate codec costs and what it does to the Adam
update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statecodec import codecs, kernels
from statecodec.buffers import Pool
from statecodec.checkpoint.base import Elements
from statecodec.checkpoint.chain import Base
from statecodec.checkpoint.source import SourceCheckpoint, SourceItem
from statecodec.choose.budget import Option
from statecodec.codecs import Codec, rows_cols
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.errors import UnencodableValues, UnsupportedTensor
from statecodec.format.packing import Packing, encode_record
from statecodec.format.placement import MIN_PACKED
from statecodec.kernels.reference.statistics import UpdateComparison
from statecodec.layouts import Moments

_WHOLE = 1 << 19  # tensors up to this many elements are measured whole
_PIECES, _PIECE = 8, 1 << 16
Errors = Callable[[Sequence[Tensor]], float]  # squared error caused by decoded pieces (flat fp32)


@dataclass(frozen=True)
class Sample:
    """Pieces of one tensor, each contiguous in it, and how many of its elements each sampled one stands for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    pieces: tuple[Tensor, ...]
    before: tuple[Tensor, ...] = ()
    """The same pieces of the base checkpoint, where there is one that has the tensor."""

    @property
    def scale(self) -> float:
        return math.prod(self.shape) / max(sum(p.numel() for p in self.pieces), 1)

    @property
    def whole(self) -> bool:
        return len(self.chunks) == 1 and self.chunks[0].shape == self.shape

    def floats(self) -> list[Tensor]:
        """The pieces, flat, in fp32."""
        return [p.reshape(-1).to(torch.float32) for p in self.pieces]


def sample(source: SourceCheckpoint, item: SourceItem, base: Base | None = None) -> Sample:
    """The whole of a small tensor; eight evenly spread runs of rows (or of a row) of a large one."""
    chunks = tuple(_chunks(item.shape))
    known = base is not None and base.index(item) is not None
    before = tuple(base.values(item, c) for c in chunks) if base is not None and known else ()
    return Sample(item.shape, item.dtype, chunks, tuple(source.chunk(item, c) for c in chunks), before)


def _chunks(shape: tuple[int, ...]) -> Iterator[Chunk]:
    total = math.prod(shape)
    if total <= _WHOLE:
        yield Chunk(0, total, shape)
        return
    rows, cols = rows_cols(shape)
    if cols <= _PIECE:
        height = _PIECE // cols
        for i in range(_PIECES):
            row = (rows - height) * i // (_PIECES - 1)
            yield Chunk(row * cols, (row + height) * cols, (height, cols))
        return
    for i in range(_PIECES):
        row, start = (rows - 1) * i // (_PIECES - 1), (cols - _PIECE) * i // (_PIECES - 1) // _PIECE * _PIECE
        yield Chunk(row * cols + start, row * cols + start + _PIECE, (1, _PIECE))


def measure(found: Sample, codec: Codec, packing: Packing, errors: Errors) -> Option | None:
    """What a codec costs for the sampled tensor and what error it causes; None if it does not take it."""
    try:
        unpacked = codec.nbytes(found.shape, found.dtype)
        if codec.align(found.shape) is None and not found.whole:
            return _measure_as_one(found, codec, unpacked, errors)
        decoded, nbytes = [], 0.0
        for i, piece in enumerate(found.pieces):
            if isinstance(codec, codecs.Residual):
                parts, values = codec.encode_from(piece, found.before[i])
            else:
                encoded = codec.encode(piece)
                parts, values = dict(encoded.parts), encoded.decode()
            nbytes += _packed(list(parts.values()), packing)
            decoded.append(values.reshape(-1).to(torch.float32))
    except (UnencodableValues, UnsupportedTensor):
        return None
    if packing.method == "none" or unpacked < MIN_PACKED:
        nbytes = unpacked / found.scale
    return Option(codec, nbytes * found.scale, errors(decoded) * found.scale)


def _measure_as_one(found: Sample, codec: Codec, unpacked: int, errors: Errors) -> Option | None:
    """A codec that needs the whole tensor, on the sampled rows as if they were all: an estimate, verified later."""
    if len(found.shape) != 2 or any(c.shape[1] != found.shape[1] for c in found.chunks):
        return None
    decoded = codec.encode(torch.cat([p.reshape(-1, found.shape[1]) for p in found.pieces])).decode()
    pieces = torch.split(decoded.reshape(-1).to(torch.float32), [p.numel() for p in found.pieces])
    return Option(codec, unpacked, errors(pieces) * found.scale)


def _packed(parts: Sequence[Tensor], packing: Packing) -> int:
    pool = Pool()
    return encode_record([p.contiguous() for p in parts], packing, pool)[1] if packing.method != "none" else 0


def weight_errors(found: Sample) -> Errors:
    """Squared error of the values themselves."""
    exact = found.floats()

    def errors(decoded: Sequence[Tensor]) -> float:
        results = [kernels.host().compare(a, b) for a, b in zip(exact, decoded, strict=True)]
        return math.inf if any(r.mismatched for r in results) else sum(r.sum_sq_diff for r in results)

    return errors


class UpdateErrors:
    """Squared error of the Adam update direction of one parameter, on its samples."""

    def __init__(self, moments: Moments, first: Sample, second: Sample) -> None:
        self.first, self.second = first.floats(), second.floats()
        self._settings = settings(moments)
        exact = [self._compare(m, v, m, v) for m, v in zip(self.first, self.second, strict=True)]
        self.finite = not any(e.nonfinite for e in exact)
        self.energy = sum(e.sum_sq for e in exact) * first.scale

    def of_first(self, decoded: Sequence[Tensor]) -> float:
        """With decoded first and exact second moments."""
        return self.of_both(decoded, self.second)

    def of_second(self, decoded: Sequence[Tensor]) -> float:
        """With exact first and decoded second moments."""
        return self.of_both(self.first, decoded)

    def of_both(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
        """With both decoded; infinite where the update is."""
        streams = zip(self.first, self.second, first, second, strict=True)
        results = [self._compare(*pieces) for pieces in streams]
        return math.inf if any(r.nonfinite for r in results) else sum(r.sum_sq_diff for r in results)

    def _compare(self, m: Tensor, v: Tensor, m_other: Tensor, v_other: Tensor) -> UpdateComparison:
        return kernels.host().compare_updates(m, v, m_other, v_other, **self._settings)


def settings(moments: Moments) -> dict[str, float]:
    """Keyword arguments of `compare_updates` for one parameter."""
    step = moments.step if moments.step and moments.step > 0 else math.inf
    return {
        "correction1": correction(moments.beta1, step), "correction2": correction(moments.beta2, step),
        "eps": moments.eps,
    }  # fmt: skip


def correction(beta: float, step: float) -> float:
    """Adam's bias correction 1 - beta**step; 1 where the step is unknown or the beta is none."""
    return (1.0 - beta**step if step < math.inf and 0.0 <= beta < 1.0 else 1.0) or 1.0


def decoded_stream(source: SourceCheckpoint, item: SourceItem, codec: Codec, base: Base | None = None) -> Elements:
    """A tensor's elements as they will be after encoding with `codec`, streamed. Raises UnencodableValues."""

    def chunks() -> Iterator[Tensor]:
        for chunk in iterate(codec, item.shape, item.dtype):
            x = source.chunk(item, chunk)
            if isinstance(codec, codecs.Residual) and base is not None:
                x = codec.encode_from(x, base.values(item, chunk))[1]
            elif not isinstance(codec, codecs.Raw):
                x = codec.encode(x).decode()
            yield x.reshape(-1)

    return Elements(chunks())
