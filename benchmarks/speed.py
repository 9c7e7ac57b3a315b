"""Speed beside what people use today, on one file of at least 1 GB and one of 130 MB, file to file, in one run.

What two threads gain is measured on these, and on a larger file with a parameter of three tensors of 1 GiB.

Every contender reads the same checkpoint from the page cache, writes its output with fsync, and reads it back into a
file. Neither file is there before: to free the last one takes 0.06 CPU seconds a GB. The figure is GB of the original
per CPU second (user + system, all threads), the best of `--runs`, contenders taking turns.

    python benchmarks/speed.py [--bytes 1100000000] [--small 130000000] [--larger 4000000000] [--runs 3]
        -> benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import filecmp
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blosc2
import torch
import zstandard
from common import CACHE, grown, record, spent
from zipnn import ZipNN

import statecodec

BLOCK = (
    8 << 20
)  # what works in memory gets so much at a time: from 32 MiB on the C library gives memory back every time
LARGEST = 1 << 30  # bytes of each tensor of one parameter of the larger file
Contender = tuple[Callable[[Path, Path], Any], Callable[[Path, Path], Any]]
Rates = dict[str, dict[str, float]]
EXACT = ("lossless", "lossless, no sha256", "copy", "zstd -1", "zipnn", "blosc2 shuffle zstd")
SMALL = (
    "copy",
    "statecodec resume",
    "statecodec resume, sha256",
    "statecodec resume, two threads",
    "statecodec lossless",
    "zipnn",
)
THREADS = ("statecodec resume", "statecodec resume, two threads")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=1_100_000_000)
    parser.add_argument("--small", type=int, default=130_000_000)
    parser.add_argument("--larger", type=int, default=4_000_000_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    large, small, larger = grown(arguments.bytes), grown(arguments.small), grown(arguments.larger, LARGEST)
    several = contenders()
    rates, few = measured(large, several, arguments.runs), {name: several[name] for name in SMALL}
    rates_small = measured(small, few, arguments.runs)
    rates_larger = measured(larger, {name: several[name] for name in THREADS}, arguments.runs)
    record(
        "speed",
        {
            "bytes": large.stat().st_size,
            "unit": "GB of the original per CPU second / wall second",
            "contenders": rates,
            "against_zipnn": against(rates),
            "small": {
                "bytes": small.stat().st_size,
                "contenders": rates_small,
                "against_zipnn": against(rates_small),
            },
            "larger": {"bytes": larger.stat().st_size, "contenders": rates_larger},
        },
    )


def measured(source: Path, several: dict[str, Contender], runs: int) -> Rates:
    """Rates of every contender on one file."""
    nbytes, best = source.stat().st_size, dict[str, dict[str, float]]()
    packed, back = CACHE / "speed.packed", CACHE / "speed.back"
    for run in range(runs + 1):  # the first turn warms caches and compiles; it does not count
        for name, (compress, restore) in several.items():
            packed.unlink(missing_ok=True)
            with spent() as forward:
                compress(source, packed)
            ratio = nbytes / packed.stat().st_size
            back.unlink(missing_ok=True)
            with spent() as backward:
                restore(packed, back)
            if not run and name.endswith(EXACT):
                assert filecmp.cmp(source, back, shallow=False), f"{name} does not restore the file"
            found = best.setdefault(name, {"ratio": ratio})
            for verb, value in (("compress", forward), ("restore", backward)):
                for key, seconds in ((f"{verb}_cpu", value.cpu), (f"{verb}_wall", value.wall)):
                    found[key] = max(found.get(key, 0.0), nbytes / seconds / 1e9 if run else 0.0)
            print(f"run {run} {name}: {found}", flush=True)
    for path in (packed, back):
        path.unlink()
    return best


def against(rates: Rates) -> Rates:
    """Times the rate of ZipNN, per CPU second."""
    zipnn = rates["zipnn"]
    verbs = ("compress", "restore")
    return {name: {verb: r[f"{verb}_cpu"] / zipnn[f"{verb}_cpu"] for verb in verbs} for name, r in rates.items()}


def contenders() -> dict[str, Contender]:
    """Name -> (compress, restore), each file to file."""

    def ours(preset: str, threads: int = 1, **options: Any) -> Contender:
        return (
            lambda a, b: statecodec.compress(a, b, preset=preset, force=True, threads=threads, **options),
            lambda a, b: statecodec.restore(a, b, force=True, threads=threads),
        )

    level1 = zstandard.ZstdCompressor(level=1)
    return {
        "copy": (by_block(bytes), by_block(bytes, framed=True)),
        "statecodec resume": ours("resume"),
        "statecodec resume, sha256": ours("resume", sha256=True),
        "statecodec resume, two threads": ours("resume", threads=2),
        "statecodec small": ours("small"),
        "statecodec live": ours("live"),
        "statecodec lossless": ours("lossless"),
        "statecodec lossless, no sha256": ours("lossless", sha256=False),
        "zstd -1": (by_block(level1.compress), by_block(zstandard.ZstdDecompressor().decompress, framed=True)),
        "zipnn": (by_block(zipnn_compress), by_block(zipnn_decompress, framed=True)),
        "blosc2 shuffle zstd": (
            by_block(lambda d: blosc2.compress2(d, typesize=4, codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1)),
            by_block(blosc2.decompress2, framed=True),
        ),
        "torch.save of a bf16 cast": (bf16_save, bf16_load),
    }


def zipnn_compress(data: bytes) -> bytes:
    """ZipNN of whole elements.

    It corrupts its heap on a length that is no multiple of four, so a tail goes in front.
    """
    cut = len(data) // 4 * 4
    return bytes([len(data) - cut]) + data[cut:] + bytes(_zipnn().compress(data[:cut]))


def zipnn_decompress(data: bytes) -> bytes:
    """The inverse."""
    return bytes(_zipnn().decompress(data[1 + data[0] :])) + data[1 : 1 + data[0]]


def _zipnn() -> ZipNN:
    return ZipNN(input_format="byte", bytearray_dtype="float32")


def by_block(function: Callable[[bytes], bytes], framed: bool = False) -> Callable[[Path, Path], None]:
    """File to file through `function`, 64 MiB at a time; compressed blocks are framed by their length."""

    def blocks(path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while head := file.read(8) if framed else b"?":
                block = file.read(int.from_bytes(head, "little") if framed else BLOCK)
                if not block:
                    return
                yield block

    def run(source: Path, target: Path) -> None:
        with target.open("wb") as file:
            for block in blocks(source):
                made = bytes(function(block))
                if not framed:
                    file.write(len(made).to_bytes(8, "little"))
                file.write(made)
            file.flush()
            os.fsync(file.fileno())

    return run


def bf16_save(source: Path, target: Path) -> None:
    """What people do instead: everything in bf16."""
    checkpoint = torch.load(source, weights_only=True)
    _save(_cast(checkpoint, torch.float32, torch.bfloat16), target)


def bf16_load(source: Path, target: Path) -> None:
    """... and back."""
    _save(_cast(torch.load(source, weights_only=True), torch.bfloat16, torch.float32), target)


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(new) if value.dtype == old else value
    return {k: _cast(v, old, new) for k, v in value.items()} if isinstance(value, dict) else value


def _save(value: Any, target: Path) -> None:
    with target.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
