"""The arithmetic alone, memory to memory, beside the compressors people use.

No file is read or written in the timed part. Every contender gets the tensors of a checkpoint of at least 1 GB,
resident in memory, in the pieces it works on; results are thrown away. The figure is GB of the original per CPU second,
the best of `--runs`, contenders taking turns.

    python benchmarks/codec_speed.py [--bytes 1100000000] [--runs 3]        -> benchmarks/results/codec_speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import blosc2
import numpy as np
import torch
import xxhash
import zstandard
from common import grown, record, spent
from torch import Tensor
from zipnn import ZipNN

from statecodec import kernels
from statecodec.buffers import Pool, ThreadScratch
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.codecs import Codec, Raw
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.format.packing import Packing, decode_record, encode_record
from statecodec.verbs.compress import open_source
from statecodec.verbs.settings import CompressSettings

Work = tuple[Callable[[], int], Callable[[], None]]
Tensors = Sequence[tuple[SourceItem, Tensor]]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=1_100_000_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(grown(arguments.bytes))
    tensors = list(loaded(source))
    nbytes, several = sum(t.nbytes for _, t in tensors), contenders(source, tensors)
    best: dict[str, dict[str, float]] = {}
    for run in range(arguments.runs + 1):  # the first turn warms caches and compiles; it does not count
        for name, (compress, restore) in several.items():
            with spent() as forward:
                size = compress()
            with spent() as backward:
                restore()
            found = best.setdefault(name, {"ratio": nbytes / size, "compress": 0.0, "restore": 0.0})
            if run:
                found["compress"] = max(found["compress"], nbytes / forward.cpu / 1e9)
                found["restore"] = max(found["restore"], nbytes / backward.cpu / 1e9)
            print(f"run {run} {name}: {found}", flush=True)
    zipnn = best["zipnn"]
    for found in best.values():
        found["compress_against_zipnn"] = found["compress"] / zipnn["compress"]
        found["restore_against_zipnn"] = found["restore"] / zipnn["restore"]
    record("codec_speed", {"bytes": nbytes, "unit": "GB of the original per CPU second", "contenders": best})


def loaded(source: SourceCheckpoint) -> Iterator[tuple[SourceItem, Tensor]]:
    """Every large tensor of the checkpoint, with what the chooser sees of it."""
    for item in source.items:
        if item.region is not None and item.numel >= 4096:
            yield item, source.decode(item.index)


def contenders(source: SourceCheckpoint, tensors: Tensors) -> dict[str, Work]:
    """Name -> (compress everything and return the size, restore everything)."""
    blocks = [t.numpy().tobytes() for _, t in tensors]
    level1, level1_back = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    presets = ("resume", "small", "live", "lossless")
    return {
        **{f"statecodec {preset}": ours(source, tensors, preset) for preset in presets},
        "zstd -1": on_bytes(blocks, level1.compress, level1_back.decompress),
        "zipnn": on_bytes(blocks, lambda d: _zipnn().compress(d), lambda d: _zipnn().decompress(d)),
        "blosc2 shuffle zstd": on_bytes(
            blocks,
            lambda d: blosc2.compress2(d, typesize=4, codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1),
            blosc2.decompress2,
        ),
        "bf16 cast": casts([t for _, t in tensors]),
    }


def on_bytes(blocks: list[bytes], compress: Callable[[bytes], Any], restore: Callable[[bytes], Any]) -> Work:
    """A compressor of byte strings, a tensor at a time."""
    made: list[bytes] = []

    def forward() -> int:
        made[:] = [bytes(compress(block)) for block in blocks]
        return sum(map(len, made))

    def backward() -> None:
        for block in made:
            restore(block)

    return forward, backward


def casts(tensors: list[Tensor]) -> Work:
    """Rounding to bf16 and back."""
    made: list[Tensor] = []

    def forward() -> int:
        made[:] = [t.to(torch.bfloat16) for t in tensors]
        return sum(t.nbytes for t in made)

    def backward() -> None:
        for t in made:
            t.to(torch.float32)

    return forward, backward


Key = tuple[str, int]  # item, first element of a chunk


class _Coder:
    """What `compress` and `restore` do to a chunk between reading and writing it."""

    def __init__(self, source: SourceCheckpoint, tensors: Tensors, preset: str) -> None:
        self.values = {item.name: tensor.view(-1) for item, tensor in tensors}
        self.items = {item.name: item for item, _ in tensors}
        self.choices = CompressSettings.of(preset=preset).choose(source, None, 1)
        self.pool, self.packing = Pool(), Packing()
        self.scratch, self.beside = ThreadScratch(), ThreadScratch()
        self.made: dict[Key, tuple[Chunk, bytes]] = {}
        self.decoded: set[Key] = set()

    def forward(self) -> int:
        """Every chunk encoded, its error summed, packed and hashed; returns the bytes."""
        self.made.clear()
        for name, item in self.items.items():
            codec = self.choices[name].codec
            for chunk in iterate(codec, item.shape, item.dtype):
                self.made[name, chunk.start] = chunk, self._encode(name, codec, chunk)
        return sum(len(data) for _, data in self.made.values())

    def backward(self) -> None:
        """... and back; second moments are decoded with their first moments."""
        self.decoded.clear()
        for name, start in self.made:
            if (name, start) not in self.decoded:
                self._decode(name, start, self.scratch)

    def _encode(self, name: str, codec: Codec, chunk: Chunk) -> bytes:
        x = self.values[name][chunk.start : chunk.stop].view(chunk.shape)
        parts = {"data": x}
        if not isinstance(codec, Raw):
            specs = codec.parts(chunk.shape, self.items[name].dtype)
            parts = {part: self.scratch.take("part", s.dtype.torch, s.shape, part) for part, s in specs.items()}
            given = {
                role: self.values[other][chunk.start : chunk.stop]
                for role, other in self.choices[name].companions.items()
            }
            codec.encode_into(x, parts, kernels.host(), given)
        buffer, size = encode_record(list(parts.values()), self.packing, self.pool)
        made = bytes(buffer[:size])
        xxhash.xxh3_64_hexdigest(made)
        self.pool.give(buffer)
        return made

    def _decode(self, name: str, start: int, scratch: ThreadScratch) -> Tensor:
        self.decoded.add((name, start))
        chunk, data = self.made[name, start]
        xxhash.xxh3_64_hexdigest(data)
        item, codec = self.items[name], self.choices[name].codec
        specs = codec.parts(chunk.shape, item.dtype)
        parts = {part: scratch.take("part", s.dtype.torch, s.shape, part) for part, s in specs.items()}
        decode_record(np.frombuffer(bytearray(data), np.uint8), list(parts.values()), self.pool)
        if isinstance(codec, Raw):
            return parts["data"]
        out = scratch.take("decoded", item.dtype.torch, chunk.shape)
        given = {role: self._decode(other, start, self.beside) for role, other in self.choices[name].companions.items()}
        codec.decode_into(parts, out, kernels.host(), given)
        return out


def ours(source: SourceCheckpoint, tensors: Tensors, preset: str) -> Work:
    """The codecs that `compress` chooses. Choosing them is not counted: it reads the file."""
    coder = _Coder(source, tensors, preset)
    return coder.forward, coder.backward


def _zipnn() -> ZipNN:
    return ZipNN(input_format="byte", bytearray_dtype="float32")


if __name__ == "__main__":
    main()
