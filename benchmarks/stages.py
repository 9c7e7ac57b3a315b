"""Where the CPU seconds of `compress` and `restore` go, file to file: CPU time of each stage without the stages in it.

Functions are wrapped while they are measured, which costs about two microseconds a call. The figures are CPU seconds
(of all threads) a GB of the original, the lowest of `--runs` for each stage by itself. `rest` is everything between the
stages.

    python benchmarks/stages.py [--bytes 1100000000] [--runs 5] [--threads 1] [--preset resume] [--sha256]
"""

from __future__ import annotations

import argparse
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import CACHE, grown

import statecodec
from statecodec import staging
from statecodec.checkpoint import digests, source, source_crcs, span_crcs
from statecodec.checkpoint.shared_reads import SharedReads
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.format import finished, packing, planes, reader, writer
from statecodec.format.open_files import OpenFiles
from statecodec.kernels import cpu
from statecodec.verbs import appending, compress, compression, processors, restore
from statecodec.verbs.settings import CompressSettings

KERNELS = {
    "choosing": ("size", "update_size"),
    "encoding": ("encode_uniform", "encode_direction", "encode_logarithmic", "encode_companded", "encode_split"),
    "decoding": ("decode_uniform", "decode_direction", "decode_logarithmic", "decode_companded", "decode_split"),
    "narrowing": ("form_of", "narrow", "widen"),
    "planes": ("byte_counts", "centre", "uncentre"),
}
STAGES: list[tuple[str, Any, str]] = [
    *((stage, cpu, name) for stage, names in KERNELS.items() for name in names),
    *(("planes", cpu.planes, name) for name in ("constant", "split_words", "merge_words")),
    ("opening the source", compress, "open_source"),
    ("opening the source", compress, "pickles"),
    ("choosing", CompressSettings, "choose"),
    ("reading", source, "read_exactly"),
    ("Python: read a chunk", SharedReads, "chunk_with_memory"),
    ("Python: read a chunk", source.SourceCheckpoint, "chunk_with_memory"),
    ("SHA-256", digests.FileHashes, "run"),
    ("CRCs", source_crcs.SourceCrcs, "add"),
    ("CRCs", source_crcs.SourceCrcs, "finish"),
    ("Python: encode a chunk", compression.Compression, "encode"),
    ("Python: encode a chunk", processors.Cpu, "encode"),
    ("Python: pack a chunk", writer.Writer, "pack"),
    ("Python: pack a chunk", packing, "_write_record"),
    ("zstd", planes, "_compress_centred"),
    ("zstd", packing, "pack_plane"),
    ("zstd", packing, "unpack_plane"),
    ("Python: append a chunk", writer.Writer, "append"),
    ("Python: append a chunk", appending._Run, "_append_all"),
    ("writing", staging.StagedFile, "write_at"),
    ("writing", restore, "write_exactly"),
    ("manifest, fsync, rename", writer.Writer, "finish"),
    ("manifest, fsync, rename", finished.Finished, "publish"),
    ("opening the compressed file", StoredCheckpoint, "__init__"),
    ("reading", OpenFiles, "read_into"),
    ("checksums", reader, "_check"),
    ("Python: unpack a chunk", reader.Reader, "read_chunk"),
    ("Python: decode a chunk", StoredCheckpoint, "decode_chunk"),
    ("Python: write a chunk", restore._Writing, "write"),
    ("Python: write a chunk", restore._Writing, "_put"),
    ("CRCs", span_crcs.SpanCrcs, "add"),
    ("CRCs", span_crcs.SpanCrcs, "finish"),
]


class Stages:
    """CPU seconds by stage, of all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock, self._within = threading.Lock(), threading.local()

    def time(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with what it takes counted under `stage`, except what stages within it take."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            stack = self._within.__dict__.setdefault("stack", [])
            stack.append(0.0)
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - started
                own = taken - stack.pop()
                if stack:
                    stack[-1] += taken
                with self._lock:
                    self.seconds[stage] += own

        return timed

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Time a function in its place."""
        setattr(owner, name, self.time(stage, getattr(owner, name)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=1_100_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="resume")
    parser.add_argument("--sha256", action="store_true", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path, stages = grown(arguments.bytes), Stages()
    packed, back = CACHE / "stages.packed", CACHE / "stages.back"
    for stage, owner, name in STAGES:
        stages.wrap(owner, name, stage)
    verbs: dict[str, Callable[[], Any]] = {
        "compress": lambda: statecodec.compress(
            path, packed, force=True, preset=arguments.preset, threads=arguments.threads, sha256=arguments.sha256
        ),
        "restore": lambda: statecodec.restore(packed, back, force=True, threads=arguments.threads),
    }
    runs = [{verb: measured(run, stages) for verb, run in verbs.items()} for _ in range(arguments.runs + 1)]
    for verb in verbs:
        print(f"{verb}, CPU seconds a GB")
        found = [run[verb] for run in runs[1:]]  # the first one compiles kernels and fills the page cache
        least = {stage: min(run[stage] for run in found) * 1e9 / path.stat().st_size for stage in found[0]}
        for stage, seconds in sorted(least.items(), key=lambda item: -item[1]):
            print(f"  {stage:30} {seconds:.3f}")
    packed.unlink()
    back.unlink()


def measured(run: Callable[[], Any], stages: Stages) -> dict[str, float]:
    """CPU seconds of one run, whole and by stage."""
    stages.seconds.clear()
    before = time.process_time()
    run()
    whole = time.process_time() - before
    return {"whole": whole, **stages.seconds, "rest": whole - stages.seconds.total()}


if __name__ == "__main__":
    main()
