"""Compressed file -> the original file or directory: skeleton bytes and decoded regions put back where they were."""

from __future__ import annotations

import os
import stat
import struct
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from zlib_ng import zlib_ng

from statecodec.atomic import AtomicOutput
from statecodec.buffers import memory
from statecodec.checkpoint.digests import FileHashes, FileToHash
from statecodec.checkpoint.pickles import require_safe
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.checkpoint.stored_files import StoredFile
from statecodec.errors import CorruptFile
from statecodec.files import read_exactly, reserve, write_exactly
from statecodec.layouts import Crc32, Folder
from statecodec.parallel import Workers, default_threads, ordered_map
from statecodec.progress import Meter, Progress
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import restored_path
from statecodec.verbs.processors import Processor, processor

_CRC_BLOCK = 1 << 20


def restore(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    times: bool = False,
    safe_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Put a compressed checkpoint back as the original file or directory (by default its own name, beside SRC).

    What was stored losslessly comes back bit for bit; if everything was, the SHA-256 is compared with the source's.
    Lossy tensors come back as other numbers in the same file, with the zip's CRCs recomputed. Nothing is visible under
    the destination's name before it is complete. Files and directories have the source's permission bits, and with
    `times` its modification times.

    With `force` an existing file is replaced by a file, a directory by a directory. With `safe_only` nothing is written
    whose unpickling could run code.

    Raises FormatError and its subclasses, UnsafeCheckpoint, OutputExists, OutputFailed, UsageError.
    """
    started = time.perf_counter()
    with StoredCheckpoint.open(src) as stored:
        document = stored.document
        found = require_safe(stored) if safe_only else ()
        target = restored_path(Path(src), document.source.get("name"))
        if not document.is_directory:
            target = output_file(dst, target, force=force)
        elif dst is not None:
            target = Path(dst)
        workers = threads or default_threads()
        where = processor(device, 0, workers)  # `auto` is the CPU: it decodes about as fast as it copies
        with AtomicOutput(target, directory=document.is_directory, force=force) as output:
            if document.source["layout"] == "native":
                from statecodec.checkpoint.native import restore_native

                restore_native(stored, output)
            else:
                meter = Meter(progress, sum(f.nbytes for f in document.files if f.same_as is None), "restoring")
                with Workers(where.workers(workers)) as running:
                    _restore_all(stored, where, running, meter, times, output)
            output.finish()
            output.publish()
            for root in document.folders[:1]:  # only now: a directory that may not be written to cannot be moved either
                _finish_folder(target, root, times, output)
        report = stored.report()
        notes = (*report.notes, *output.notes)
        return replace(report, seconds=time.perf_counter() - started, path=str(target), notes=notes, pickles=found)


def _restore_all(
    stored: StoredCheckpoint, where: Processor, threads: Workers, meter: Meter, times: bool, output: AtomicOutput
) -> None:
    document, made = stored.document, output.path
    if not document.is_directory:
        _restore_file(stored, document.files[0], made, where, threads, meter, output)
        output.staging.set_time(made, document.files[0].mtime_ns if times else None)
        return
    if document.folders[0].mode is not None:
        output.staging.chmod(made, 0o700)  # nobody else sees what is not there yet
    for directory in document.directories:
        (made / directory).mkdir(parents=True, exist_ok=True)
    for file in document.files:
        path = made / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.same_as is not None:
            os.link(made / file.same_as, path)
        else:
            _restore_file(stored, file, path, where, threads, meter, output)
            output.staging.set_time(path, file.mtime_ns if times else None)
    for folder in reversed(document.folders[1:]):  # what is inside first: it could not be reached any more
        _finish_folder(made / folder.path, folder, times, output)


def _finish_folder(path: Path, folder: Folder, times: bool, output: AtomicOutput) -> None:
    if folder.mode is not None:  # setgid and its like are of the place, not of the checkpoint
        output.staging.chmod(path, stat.S_IMODE(path.stat().st_mode) & ~0o777 | folder.mode & 0o777)
    output.staging.set_time(path, folder.mtime_ns if times else None)


def _restore_file(
    stored: StoredCheckpoint,
    file: StoredFile,
    path: Path,
    where: Processor,
    threads: Workers,
    meter: Meter,
    output: AtomicOutput,
) -> None:
    items = stored.reader.items
    lossy = [(offset, items[i].decoded_nbytes) for offset, i in file.regions if not stored.is_exact(i)]
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    hashes = FileHashes([FileToHash(path, file.nbytes)] if file.sha256 and not lossy else [], growing=True)
    hashes.start()
    try:
        reserve(fd, file.nbytes)
        _write_skeleton(stored, file, fd, threads, meter)
        crcs = _Crcs(fd, [c for c in file.crcs if _touches(c, lossy)], str(path))
        jobs = ((offset, index, chunk) for offset, index in file.regions for chunk in stored.chunks(index))

        def decode(job: tuple[int, int, int]) -> tuple[int, int, int]:
            offset, index, chunk = job
            first, nbytes, crc = offset + items[index].chunks[chunk].start * items[index].dtype.itemsize, 0, 0
            with where.running():
                for _, piece in stored.decode_pieces(index, chunk, where.device, where.scratch):
                    data = memory(piece)
                    write_exactly(fd, first + nbytes, data)
                    nbytes, crc = nbytes + len(data), zlib_ng.crc32(data, crc) if lossy else 0
            return first, nbytes, crc

        with ordered_map(decode, jobs, threads) as written:
            for start, nbytes, crc in written:
                crcs.add(start, nbytes, crc)
                hashes.advance(start + nbytes)
                meter.add(nbytes)
        crcs.finish()
        hashes.advance(file.nbytes)
        if hashes.files and hashes.digests() != [file.sha256]:
            raise CorruptFile(f"{file.path}: the restored bytes do not have the source's SHA-256 {file.sha256}")
        output.staging.sync(fd)
        output.staging.chmod(fd, file.mode)
    finally:
        hashes.cancel()
        os.close(fd)


def _write_skeleton(stored: StoredCheckpoint, file: StoredFile, fd: int, threads: Workers, meter: Meter) -> None:
    if file.skeleton is None:
        return
    index, items = file.skeleton, stored.reader.items
    skeleton = Skeleton(file.nbytes, ((offset, items[i].decoded_nbytes) for offset, i in file.regions))

    def decode(chunk: int) -> int:
        data = memory(stored.decode_chunk(index, chunk))
        start, done = items[index].chunks[chunk].start, 0
        for offset, length in skeleton.pieces(start, start + len(data)):
            write_exactly(fd, offset, data[done : done + length])
            done += length
        return len(data)

    with ordered_map(decode, stored.chunks(index), threads) as written:
        for nbytes in written:
            meter.add(nbytes)


class _Crcs:
    """Recomputes zip CRCs while regions are written in file order; bytes between the regions are read back."""

    def __init__(self, fd: int, crcs: list[Crc32], name: str) -> None:
        self.fd, self.name = fd, name
        self._spans: Iterator[Crc32] = iter(sorted(crcs, key=lambda c: c.offset))
        self._span: Crc32 | None = next(self._spans, None)
        self._value, self._at = 0, self._span.offset if self._span else 0

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """File bytes from `start` have been written; `crc` is their CRC-32. They lie in one span or in none."""
        while self._span is not None and start >= self._span.offset + self._span.nbytes:
            self._close()
        if self._span is None or not nbytes or start < self._span.offset:
            return
        self._fill(start)
        self._value = zlib_ng.crc32_combine(self._value, crc, nbytes)
        self._at = start + nbytes

    def finish(self) -> None:
        """Close what is open."""
        while self._span is not None:
            self._close()

    def _close(self) -> None:
        assert self._span is not None
        self._fill(self._span.offset + self._span.nbytes)
        for at in self._span.at:
            write_exactly(self.fd, at, memoryview(struct.pack("<I", self._value)))
        self._span = next(self._spans, None)
        self._value, self._at = 0, self._span.offset if self._span else 0

    def _fill(self, stop: int) -> None:
        block = memoryview(bytearray(min(_CRC_BLOCK, max(stop - self._at, 0))))
        while self._at < stop:
            piece = block[: min(len(block), stop - self._at)]
            read_exactly(self.fd, self._at, piece, self.name)
            self._value = zlib_ng.crc32(piece, self._value)
            self._at += len(piece)


def _touches(crc: Crc32, lossy: list[tuple[int, int]]) -> bool:
    """Whether a span holds bytes of a lossy region (disjoint, by offset)."""
    index = bisect_left(lossy, (crc.offset + crc.nbytes,)) - 1
    return index >= 0 and sum(lossy[index]) > crc.offset
