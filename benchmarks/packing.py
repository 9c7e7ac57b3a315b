"""What packing costs: GB of unpacked tensor per CPU-second, one 1 Mi-element chunk in reused buffers, with its floors.

    python benchmarks/packing.py [--json FILE]

Floors: a copy of the chunk, the plane kernels alone, zstd of the one plane that packs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from statecodec.buffers import Pool
from statecodec.format.packing import Packing, decode_record, encode_record
from statecodec.format.words import Words, words_of
from statecodec.kernels.cpu.planes import merge_words, split_words

N = 1 << 20


def chunks() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, generator=g) * 0.02
    return {
        "fp32 weights": w,
        "bf16 weights": w.bfloat16(),
        "fp64 weights": w.double(),
        "fp32 zeros": torch.zeros(N),
        "int8 noise": torch.randint(-128, 128, (N,), generator=g).to(torch.int8),
        "uint8 codes, 6 bits of entropy": (w * 1000 + 128).clamp(0, 255).to(torch.uint8),
    }


def rate(nbytes: int, run: Callable[[], object], rounds: int = 7, repeat: int = 10) -> float:
    """GB per CPU-second, best of several rounds."""
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeat):
            run()
        best = min(best, (time.process_time() - start) / repeat)
    return nbytes / best / 1e9


def measure(x: torch.Tensor) -> dict[str, float]:
    packing, pool = Packing(), Pool()

    def pack() -> int:
        buffer, size = encode_record([x], packing, pool)
        pool.give(buffer)
        return size

    buffer, size = encode_record([x], packing, pool)
    record, out = buffer[:size].copy(), torch.empty_like(x)
    decode_record(record, [out], pool)
    if not torch.equal(out.view(torch.uint8), x.view(torch.uint8)):
        raise SystemExit("a chunk came back changed")
    words, compressor = words_of(x), packing.compressor()
    planes, split, merge = plane_kernels(words)
    return {
        "ratio": x.nbytes / size,
        "pack": rate(x.nbytes, pack),
        "unpack": rate(x.nbytes, lambda: decode_record(record, [out], pool)),
        "copy": rate(x.nbytes, lambda: out.copy_(x)),
        "split": rate(x.nbytes, split),
        "merge": rate(x.nbytes, merge),
        "zstd of the top plane": rate(x.nbytes, lambda: compressor.compress(planes[-1])),
    }


def plane_kernels(words: Words) -> tuple[np.ndarray, Callable[[], object], Callable[[], object]]:
    """The planes of a part, and what splits it into them and merges them; bytes are their one plane."""
    source = words.unsigned
    if source.itemsize == 1:
        return source.reshape(1, -1), lambda: None, lambda: None
    planes, back = np.empty((source.itemsize, source.size), np.uint8), np.empty_like(source)
    split_words(source, planes, words.rotate)
    return (
        planes,
        lambda: split_words(source, planes, words.rotate),
        lambda: merge_words(list(planes), back, words.rotate),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(x) for name, x in chunks().items()}
    columns = list(next(iter(results.values())))
    print(f"{'GB per CPU-second':32}" + "".join(f"{c:>12}" if len(c) < 12 else f"{c:>24}" for c in columns))
    for name, row in results.items():
        print(f"{name:32}" + "".join(f"{row[c]:12.2f}" if len(c) < 12 else f"{row[c]:24.2f}" for c in columns))
    if arguments.json:
        machine = {"python": sys.version.split()[0], "machine": platform.machine(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rates": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
