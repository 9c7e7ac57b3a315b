"""The arithmetic alone, memory to memory, beside the compressors people use: no file is read or written in the timed
part.

Every contender gets the tensors of a checkpoint of at least 1 GB, resident in memory, in the pieces it works on;
results are thrown away. The figure is GB of the original per CPU second, the best of `--runs`, contenders taking turns.

    python benchmarks/codec_speed.py [--bytes 1100000000] [--runs 3]        -> benchmarks/results/codec_speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import blosc2
import torch
import xxhash
import zstandard
from common import grown, record, spent
from torch import Tensor
from zipnn import ZipNN

from statecodec import kernels
from statecodec.buffers import Pool, Scratch
from statecodec.checkpoint.base import TensorInfo
from statecodec.choose import Policy, preset_rules
from statecodec.codecs import Codec, PartSpec, Raw
from statecodec.codecs.chunking import iterate
from statecodec.dtypes import of
from statecodec.format.packing import Packing, decode_record, encode_record

BLOCK = 64 << 20
Work = tuple[Callable[[], int], Callable[[], None]]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=1_100_000_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tensors = list(loaded(arguments.bytes))
    nbytes = sum(t.nbytes for _, t in tensors)
    best: dict[str, dict[str, float]] = {}
    for run in range(arguments.runs + 1):  # the first turn warms caches and compiles; it does not count
        for name, (compress, restore) in contenders(tensors).items():
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


def loaded(nbytes: int) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Every large tensor of the checkpoint, with what the policy sees of it."""
    checkpoint = torch.load(grown(nbytes), weights_only=True)
    groups = [("weight", checkpoint["model"])]
    groups += [
        (key, {i: s[key] for i, s in checkpoint["optimizer"]["state"].items()}) for key in ("exp_avg", "exp_avg_sq")
    ]
    for role, named in groups:
        for name, tensor in named.items():
            if tensor.numel() >= 4096:
                yield TensorInfo(f"{role}.{name}", role, None, tuple(tensor.shape), tensor.dtype), tensor


def contenders(tensors: list[tuple[TensorInfo, Tensor]]) -> dict[str, Work]:
    """Name -> (compress everything and return the size, restore everything)."""
    blocks = [bytes(memoryview(t.numpy()).cast("B")) for _, t in tensors]
    level1, level1_back = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return {
        "statecodec resume": ours(tensors, "resume", measure=True),
        "statecodec resume, errors not measured": ours(tensors, "resume", measure=False),
        "statecodec lossless": ours(tensors, "lossless", measure=False),
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


@dataclass
class _Coder:
    """What `compress` and `restore` do to a chunk between reading and writing it."""

    pool: Pool
    scratch: Scratch
    packing: Packing
    measure: bool

    def encode(self, codec: Codec, x: Tensor) -> bytes:
        parts = {"data": x}
        if not isinstance(codec, Raw):
            specs = codec.parts(tuple(x.shape), of(x.dtype))
            parts = {name: self.scratch.take("part", s.dtype.torch, s.shape, name) for name, s in specs.items()}
            codec.encode_into(x, parts, kernels.host())
            if self.measure:
                out = self.scratch.take("decoded", x.dtype, tuple(x.shape))
                codec.decode_into(parts, out, kernels.host())
                kernels.host().compare(x.view(-1), out.view(-1))
        buffer, size = encode_record(list(parts.values()), self.packing, self.pool)
        made = bytes(buffer[:size])
        xxhash.xxh3_64_hexdigest(made)
        self.pool.give(buffer)
        return made

    def decode(self, codec: Codec, spec: PartSpec, made: bytes) -> None:
        xxhash.xxh3_64_hexdigest(made)
        specs = codec.parts(spec.shape, spec.dtype)
        parts = {name: self.scratch.take("part", s.dtype.torch, s.shape, name) for name, s in specs.items()}
        decode_record(torch.frombuffer(bytearray(made), dtype=torch.uint8).numpy(), list(parts.values()), self.pool)
        if not isinstance(codec, Raw):
            codec.decode_into(parts, self.scratch.take("decoded", spec.dtype.torch, spec.shape), kernels.host())


def ours(tensors: list[tuple[TensorInfo, Tensor]], preset: str, *, measure: bool) -> Work:
    """Every chunk encoded, its error measured, packed and hashed; and back."""
    coder = _Coder(Pool(), Scratch(), Packing(), measure)
    policy = Policy(preset_rules(preset))
    made: list[tuple[Codec, PartSpec, bytes]] = []

    def forward() -> int:
        made.clear()
        for subject, tensor in tensors:
            codec, flat = policy.encoding_for(subject).codec, tensor.view(-1)
            for chunk in iterate(codec, subject.shape, subject.dtype):
                x = flat[chunk.start : chunk.stop].view(chunk.shape)
                made.append((codec, PartSpec(of(x.dtype), tuple(x.shape)), coder.encode(codec, x)))
        return sum(len(data) for _, _, data in made)

    def backward() -> None:
        for codec, spec, data in made:
            coder.decode(codec, spec, data)

    return forward, backward


def _zipnn() -> ZipNN:
    return ZipNN(input_format="byte", bytearray_dtype="float32")


if __name__ == "__main__":
    main()
