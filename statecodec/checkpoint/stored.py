"""An open compressed checkpoint: the Reader's items, and the document that says what they are."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from statecodec import codecs, kernels
from statecodec.buffers import Bytes, ThreadScratch
from statecodec.checkpoint import document as documents
from statecodec.checkpoint.base import Checkpoint, TensorInfo, Window
from statecodec.checkpoint.decoded_chunks import ON_THE_CPU, DecodedChunks, Decoding
from statecodec.checkpoint.joined import NamedTensor
from statecodec.checkpoint.report import Report, TensorReport
from statecodec.checkpoint.sniff import not_compressed
from statecodec.checkpoint.stored_report import stored_report, tensor_report, text
from statecodec.codecs import Change, Codec, EncodedTensor, Encoding
from statecodec.codecs.changes import add_parts, add_values
from statecodec.codecs.chunking import PIECE_ELEMENTS, Chunk, by_rows, iterate
from statecodec.dtypes import UINT8
from statecodec.errors import CorruptFile, FormatError, LimitExceeded, UnencodableValues, UsageError
from statecodec.format import Limits, Reader
from statecodec.layouts import Moments
from statecodec.lazy import torch
from statecodec.names import shown

if TYPE_CHECKING:
    from torch import Tensor


class StoredCheckpoint(Checkpoint):
    """A compressed checkpoint, open.

    If it is a link of a chain, its base is opened when first needed, and closed with it.
    """

    def __init__(self, path: Path, reader: Reader, document: documents.Document, beside: Path | None = None) -> None:
        self.path, self.reader, self.document = path, reader, document
        self.beside = path.parent if beside is None else beside
        self._kept, self._scratch = DecodedChunks(), ThreadScratch()
        self._bases: list[StoredCheckpoint] = []
        self._lock = threading.Lock()
        self.items = tuple(
            TensorInfo(
                item.name,
                text(item.attributes.get("role")) or "other",
                text(item.attributes.get("param")),
                item.shape,
                item.dtype,
                index,
            )
            for index, item in enumerate(reader.items)
        )

    @classmethod
    def open(cls, path: str | Path, limits: Limits | None = None, *, beside: Path | None = None) -> StoredCheckpoint:
        """Open and check the manifest. Raises FormatError and its subclasses.

        `beside`: the folder in which a link's base lies, where that is not the file's own.
        """
        try:
            reader = Reader(path, limits or Limits())
        except FormatError as error:
            raise not_compressed(Path(path)) or error from None
        return cls.of(reader, beside=beside)

    @classmethod
    def of(cls, reader: Reader, *, beside: Path | None = None) -> StoredCheckpoint:
        """The checkpoint in an open file; closing the checkpoint closes the file. Raises FormatError."""
        try:
            stored = cls(reader.path, reader, documents.from_json(reader.document, reader.items), beside)
            if stored.document.base is None and any(item.encoding.change for item in reader.items):
                raise FormatError(f"{reader.path} stores changes, but does not say since when")
            return stored
        except BaseException:
            reader.close()
            raise

    @property
    def moments(self) -> tuple[Moments, ...]:
        return tuple(m for file in self.document.files for m in file.moments)

    @property
    def listing(self) -> tuple[str, ...]:
        document = self.document
        return (*(f.path for f in document.files), *document.directories) if document.is_directory else ()

    @cached_property
    def joined(self) -> Mapping[str, NamedTensor]:
        return {tensor.name: tensor for tensor in self.document.tensors}

    @cached_property
    def windows(self) -> Mapping[str, Window]:
        windows = {}
        for file in self.document.files:
            prefix = f"{shown(file.path)}:" if self.document.is_directory else ""
            for view in file.views:
                windows[prefix + view.name] = Window(view, file.regions[view.region][1])
        return windows

    def stream(self, tensor: TensorInfo) -> Iterator[Tensor]:
        for number in self.chunks(tensor.index):
            for _, piece in self.decode_pieces(tensor.index, number):
                yield piece.reshape(-1)

    def stored_as(self, index: int) -> Encoding:
        return self.reader.items[index].encoding

    def is_exact(self, index: int) -> bool:
        """Whether an item comes back bit for bit."""
        item = self.reader.items[index]
        if item.encoding.codec.repeats:
            (original,) = item.companions.values()
            return self.reader.items[self.reader.index(original)].encoding.exact
        return item.encoding.exact

    def close(self) -> None:
        """Close the files of the chain that are open."""
        self.reader.close()
        for base in self._bases:
            base.close()

    @property
    def base(self) -> StoredCheckpoint:
        """The checkpoint that this one builds on. Raises FormatError if it is missing, or another file."""
        with self._lock:
            if not self._bases:
                self._bases.append(_open_base(self))
            return self._bases[0]

    def chunks(self, item: int) -> Iterator[int]:
        """Chunk numbers of an item."""
        return iter(range(len(self.reader.items[item].chunks)))

    def decode_pieces(self, item: int, chunk: int, decoding: Decoding = ON_THE_CPU) -> Iterator[tuple[int, Tensor]]:
        """Decode a chunk piece by piece: (first element in the item, decoded elements).

        A piece is valid until the next one.

        There is one piece, unless the chunk is a large tensor of a codec that takes it whole: a small file may hold a
        large one.
        """
        stored = self.reader.items[item]
        place, codec = stored.chunks[chunk], stored.encoding.codec
        if codec.in_pieces and place.stop - place.start > PIECE_ELEMENTS:
            parts = self.parts(item, chunk, decoding.scratch)
            host = kernels.resolve(None, torch.device("cpu"))
            for piece in iterate(codecs.Raw(), codec.rows_cols(place.shape), stored.dtype, PIECE_ELEMENTS):
                out = torch.empty(piece.shape, dtype=stored.dtype.torch, device="cpu")
                codec.decode_piece(parts, place.shape, piece.start, out, host)
                yield place.start + piece.start, out
        else:
            yield place.start, self.decode_chunk(item, chunk, decoding)

    def decode_chunk(self, item: int, chunk: int, decoding: Decoding = ON_THE_CPU) -> Tensor:
        """One chunk of an item, checked and decoded, in the chunk's shape and the item's dtype."""
        kept = self._kept.take((item, chunk))
        if kept is not None:
            return kept
        stored = self.reader.items[item]
        codec, place = stored.encoding.codec, stored.chunks[chunk]
        device, scratch, shape = decoding.device, decoding.scratch, place.shape
        if stored.encoding.change is Change.VALUES:
            before = self.base.decode_range(self._in_base(item), place.start, place.stop)
            return add_values(codec, self._stored_parts(item, chunk, scratch), before.view(shape), stored.dtype.torch)
        parts = self.parts(item, chunk, scratch)
        if isinstance(codec, codecs.Raw):
            return parts["data"].view(shape)
        if scratch is not None:
            out = scratch.take("decoded", stored.dtype.torch, tuple(shape))
        else:
            out = self._empty(item, tuple(shape), torch.device("cpu"))
        companions = self._companions(item, place) if decoding.companions is None else decoding.companions
        if device is None or device.type == "cpu" or not codec.portable:
            codec.decode_into(parts, out, kernels.host(), companions)
            return out
        there = self._empty(item, tuple(shape), device)
        moved = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
        codec.decode_into(moved, there, kernels.resolve(None, device), companions)
        return out.copy_(there)

    def chunk_bytes(self, item: int, chunk: int) -> Bytes:
        """One chunk of an item, checked and decoded, as bytes; torch is not needed where they are stored as such."""
        stored = self.reader.items[item]
        raw = isinstance(stored.encoding.codec, codecs.Raw) and stored.encoding.change is None
        if raw and stored.dtype is UINT8 and len(stored.shape) == 1:
            return self.reader.read_bytes(item, chunk)
        return self.decode_chunk(item, chunk).reshape(-1).view(torch.uint8).numpy()

    def _companions(self, item: int, chunk: Chunk) -> codecs.Companions:
        """The companions of a chunk, decoded: values of the same elements of other items."""
        named = self.reader.items[item].companions
        return {role: self._companion(self.reader.index(name), chunk) for role, name in named.items()}

    def _companion(self, item: int, chunk: Chunk) -> Tensor:
        """Elements of an item, decoded. A chunk that is cut alike is kept, because its own turn comes soon."""
        chunks = self.reader.items[item].chunks
        number = bisect_left(chunks, chunk.start, key=lambda c: c.start)
        if number == len(chunks) or (chunks[number].start, chunks[number].stop) != (chunk.start, chunk.stop):
            return self.decode_range(item, chunk.start, chunk.stop)
        values = self.decode_chunk(item, number)
        self._kept.put((item, number), values)
        return values

    def parts(self, item: int, chunk: int, scratch: ThreadScratch | None = None) -> Mapping[str, Tensor]:
        """The verified parts that a chunk has under its item's codec, those of the base added where they changed.

        Raises UsageError for a change of values: its tensor has no parts, only values.
        """
        stored = self.reader.items[item]
        if stored.encoding.standalone is None:
            raise UsageError(f"{stored.name} is stored as {stored.encoding}: its tensor has values and no parts")
        parts = self._stored_parts(item, chunk, scratch)
        if stored.encoding.change is None:
            return parts
        place, codec = stored.chunks[chunk], stored.encoding.codec
        return add_parts(parts, self.base.parts_under(codec, self._in_base(item), place))

    def _stored_parts(self, item: int, chunk: int, scratch: ThreadScratch | None) -> Mapping[str, Tensor]:
        """The verified parts of a chunk as the file has them."""
        out = None
        if scratch is not None:
            stored = self.reader.items[item]
            specs = stored.encoding.parts(stored.chunks[chunk].shape, stored.dtype)
            out = {name: scratch.take("part", s.dtype.torch, s.shape, name) for name, s in specs.items()}
        return self.reader.read_chunk(item, chunk, out)

    def parts_under(self, codec: Codec, item: int, elements: Chunk) -> Mapping[str, Tensor]:
        """The parts that elements of an item have under a codec: its own parts, or its decoded values encoded anew.

        Raises FormatError if the codec refuses its values.
        """
        stored = self.reader.items[item]
        if stored.encoding.standalone == codec:
            return self.parts(item, self.chunk_at(item, elements))
        try:
            return codec.encode(self.decode_range(item, elements.start, elements.stop).view(elements.shape)).parts
        except UnencodableValues as error:
            raise FormatError(f"{self.path}: {stored.name} is no base for {codec}: {error}") from error

    def encoded(self, item: int) -> EncodedTensor:
        """A whole item in its encoded form.

        It is decoded if it has no such form: a change of values, or an item that needs companions.
        """
        stored = self.reader.items[item]
        codec = stored.encoding.standalone
        if codec is None or codec.needs:
            return codecs.Raw().encode(self.decode(item))
        if stored.encoding.change is None:
            return self.reader.read(stored.name)
        pieces = [self.parts(item, number) for number in range(len(stored.chunks))]
        parts = {}
        for name, spec in codec.parts(stored.shape, stored.dtype).items():
            parts[name] = torch.cat([piece[name].reshape(-1) for piece in pieces]).view(spec.shape)
        return EncodedTensor(codec, stored.shape, stored.dtype.torch, parts)

    def _empty(self, item: int, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        stored = self.reader.items[item]
        try:
            return torch.empty(shape, dtype=stored.dtype.torch, device=device)
        except (RuntimeError, MemoryError) as error:  # which of them torch raises without memory depends on the device
            size = math.prod(shape) * stored.dtype.itemsize
            raise LimitExceeded(f"{self.path}: no memory for {size:,} bytes of {stored.name}") from error

    def chunk_at(self, item: int, chunk: Chunk) -> int:
        """The number of the chunk with the same elements as one of another file.

        Raises FormatError if there is none.
        """
        chunks = self.reader.items[item].chunks
        index = bisect_left(chunks, chunk.start, key=lambda c: c.start)
        if index == len(chunks) or (chunks[index].start, chunks[index].shape) != (chunk.start, chunk.shape):
            raise FormatError(f"{self.path}: {self.reader.items[item].name} is cut differently from its base")
        return index

    def elements(self, tensor: TensorInfo, start: int, stop: int) -> Tensor:
        return self.decode_range(tensor.index, start, stop)

    def decode_range(self, item: int, start: int, stop: int) -> Tensor:
        """Elements start..stop of an item, flat."""
        pieces = [
            self._decode_part(item, number, max(start - c.start, 0), min(stop, c.stop) - c.start)
            for number, c in enumerate(self.reader.items[item].chunks)
            if c.start < stop and c.stop > start
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _decode_part(self, item: int, number: int, start: int, stop: int) -> Tensor:
        """Elements start..stop of a chunk, flat. No others are decoded where the codec can do without."""
        stored = self.reader.items[item]
        codec, place = stored.encoding.codec, stored.chunks[number]
        if not codec.in_pieces or stop - start == place.stop - place.start:
            return self.decode_chunk(item, number).reshape(-1)[start:stop]
        parts, out = self.parts(item, number), self._empty(item, (stop - start,), torch.device("cpu"))
        for piece in by_rows(start, stop, codec.rows_cols(place.shape)[1]):
            values = out[piece.start - start : piece.stop - start].view(piece.shape)
            codec.decode_piece(parts, place.shape, piece.start, values, kernels.host())
        return out

    def _in_base(self, item: int) -> int:
        """The base's item that a link's item is a change of."""
        stored, base = self.reader.items[item], self.base.reader
        before = base.items[base.index(stored.name)] if stored.name in base else None
        if before is None or (before.shape, before.dtype) != (stored.shape, stored.dtype):
            raise FormatError(f"{self.path}: {stored.name} is a change of a tensor that {base.path.name} does not have")
        return base.index(stored.name)

    def report_of(self, name: str) -> TensorReport:
        """The report of one stored tensor, from the manifest."""
        return tensor_report(self.reader.items[self.tensors[name].index])

    def report(self) -> Report:
        reader = self.reader
        return stored_report(self.path, reader.format_version, self.document, reader.items, reader.files)

    def decode(self, item: int) -> Tensor:
        """A whole item, checked and decoded."""
        stored = self.reader.items[item]
        if len(stored.chunks) == 1:
            return self.decode_chunk(item, 0).view(stored.shape)
        out = self._empty(item, stored.shape)
        for _ in self.decode_into(item, out.view(-1)):
            pass
        return out

    def decode_into(self, item: int, out: Tensor) -> Iterator[int]:
        """Decode a whole item into 1-D memory of its dtype; gives the number of bytes of each piece as it is there."""
        for number in self.chunks(item):
            for start, piece in self.decode_pieces(item, number, Decoding(scratch=self._scratch)):
                out[start : start + piece.numel()] = piece.reshape(-1)
                yield piece.nbytes


def _open_base(stored: StoredCheckpoint) -> StoredCheckpoint:
    """The base of an open link, checked. Raises FormatError if it is not there, CorruptFile if it is another file."""
    base = stored.document.base
    assert base is not None
    path = stored.beside / base.name
    if not path.exists():
        raise FormatError(
            f"{stored.path} stores what changed since {base.name}, which must lie beside it and does not; the chain "
            f"has {base.length} earlier file{'s' if base.length > 1 else ''}"
        )
    opened = StoredCheckpoint.open(path)
    if opened.reader.digest != base.digest:
        opened.close()
        raise CorruptFile(f"{path} is not the file that {stored.path.name} was made from: its digest is another")
    before = opened.document.base.length if opened.document.base else 0
    if before != base.length - 1:
        opened.close()
        raise FormatError(f"{stored.path} is said to be link {base.length} of a chain, its base {before}")
    return opened
