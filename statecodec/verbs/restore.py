"""Compressed file -> the original file or directory: skeleton bytes and decoded regions put back where they were."""

from __future__ import annotations

import os
import stat
import struct
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from zlib_ng import zlib_ng

from statecodec.atomic import AtomicOutput
from statecodec.buffers import memory
from statecodec.checkpoint.decoded_chunks import Decoding
from statecodec.checkpoint.digests import FileHashes, FileToHash
from statecodec.checkpoint.pickles import safe_pickles
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.span_crcs import SpanCrcs
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.checkpoint.stored_files import StoredFile
from statecodec.errors import CorruptFile
from statecodec.files import WriteBehind, read_exactly, reserve, write_exactly
from statecodec.layouts import Crc32, Folder
from statecodec.parallel import Workers, default_threads, ordered_map
from statecodec.progress import Meter, Progress
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import restored_path
from statecodec.verbs.processors import Processor, processor

if TYPE_CHECKING:
    from torch import Tensor


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
    """Put a compressed checkpoint back as the original file or directory.

    What was stored losslessly comes back bit for bit; if everything was, the SHA-256 is compared with the source's.
    Lossy tensors come back as other numbers in the same file, with the zip's CRCs recomputed. Nothing is visible under
    the destination's name before it is complete. Files and directories get the source's permission bits.

    Args:
        src: The compressed checkpoint.
        dst: The file or directory to write. By default the original's name, beside `src`.
        device: `cpu`, `cuda`, or `auto`, which is the CPU: it decodes about as fast as it copies.
        force: Replace a file by a file, a directory by a directory.
        times: Also give the files the source's modification times.
        safe_only: Write nothing whose unpickling could run code.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report of the compressed checkpoint.

    Raises:
        FormatError: If the compressed file, or its base, cannot be read.
        CorruptFile: If a checksum or the SHA-256 does not match.
        UnsafeCheckpoint: With `safe_only`, if unpickling the original could run code.
        UsageError: For a directory `dst` that is not there, or an unknown device.
        BackendUnavailable: For `cuda` without a card.
        OutputExists: If the destination is there, without `force`.
        OutputFailed: If it cannot be written.

    Example:
        >>> import pathlib, tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name)
        ...     torch.save({"w": torch.arange(6.0)}, folder / "ckpt.pt")
        ...     _ = statecodec.compress(folder / "ckpt.pt", preset="lossless")
        ...     _ = statecodec.restore(folder / "ckpt.sc.safetensors", folder / "again.pt")
        ...     (folder / "again.pt").read_bytes() == (folder / "ckpt.pt").read_bytes()
        True
    """
    started = time.perf_counter()
    with StoredCheckpoint.open(src) as stored:
        document = stored.document
        reports = safe_pickles(stored) if safe_only else ()
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
            for root in document.folders[:1]:  # last: a read-only directory could not be moved
                _finish_folder(target, root, times, output)
        report = stored.report()
        notes = (*report.notes, *output.notes)
        return replace(report, seconds=time.perf_counter() - started, path=str(target), notes=notes, pickles=reports)


def _restore_all(
    stored: StoredCheckpoint, where: Processor, threads: Workers, meter: Meter, times: bool, output: AtomicOutput
) -> None:
    document, restored = stored.document, output.path
    if not document.is_directory:
        _restore_file(stored, document.files[0], restored, where, threads, meter, output)
        output.staging.set_time(restored, document.files[0].mtime_ns if times else None)
        return
    if document.folders[0].mode is not None:
        output.staging.chmod(restored, 0o700)  # other users must not see it before it is complete
    for directory in document.directories:
        (restored / directory).mkdir(parents=True, exist_ok=True)
    for file in document.files:
        path = restored / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.same_as is not None:
            os.link(restored / file.same_as, path)
        else:
            _restore_file(stored, file, path, where, threads, meter, output)
            output.staging.set_time(path, file.mtime_ns if times else None)
    for folder in reversed(document.folders[1:]):  # inner folders first, while outer ones can still be entered
        _finish_folder(restored / folder.path, folder, times, output)


def _finish_folder(path: Path, folder: Folder, times: bool, output: AtomicOutput) -> None:
    if folder.mode is not None:  # setgid and sticky bits belong to the parent folder, not to the checkpoint
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
        crcs = SpanCrcs(
            (c for c in file.crcs if _touches(c, lossy)),
            lambda offset, target: read_exactly(fd, offset, target, str(path)),
            partial(_write_crc, fd),
        )
        behind, writing = WriteBehind(fd), _Writing(stored, file, fd, where, checked=bool(lossy))
        with ordered_map(writing.write, writing.jobs(), threads) as written:
            for start, nbytes, crc in writing.in_order(written):
                crcs.add(start, nbytes, crc)
                hashes.advance(start + nbytes)
                behind.wrote(nbytes)
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


_Job: TypeAlias = tuple[int, int]  # item, chunk
_Span: TypeAlias = tuple[int, int, int]  # byte of the file, number of bytes, their CRC-32


class _Writing:
    """Writes the chunks of a file's regions at their places. Thread-safe.

    A chunk that others need for decoding and that lies behind them (exp_avg_sq behind exp_avg) is decoded once, and
    written then.
    """

    def __init__(self, stored: StoredCheckpoint, file: StoredFile, fd: int, where: Processor, *, checked: bool) -> None:
        """`checked`: whether CRCs are wanted."""
        self.stored, self.fd, self.where, self.checked = stored, fd, where, checked
        self._offsets = {index: offset for offset, index in file.regions}
        self._beside = dict[int, dict[str, int]]()
        """Items whose companions are written with them: role -> item."""
        self._carried = set[int]()
        for index in self._offsets:
            companions = stored.reader.items[index].companions
            others = {role: stored.reader.index(name) for role, name in companions.items()}
            if all(self._can_carry(index, other) for other in others.values()):
                self._beside[index] = others
                self._carried.update(others.values())

    def _can_carry(self, index: int, other: int) -> bool:
        """Whether the other item can be written along with this one.

        It must lie behind this one, be cut alike, carry nothing itself, and be carried by no other item yet.
        """
        if self._offsets.get(other, -1) <= self._offsets[index] or other in self._carried:
            return False
        first, second = (self.stored.reader.items[i] for i in (index, other))
        return not second.companions and [c.start for c in first.chunks] == [c.start for c in second.chunks]

    def jobs(self) -> Iterator[_Job]:
        """What is to be written, in the order of the file, without chunks that are carried by others."""
        return ((i, chunk) for i in self._offsets if i not in self._carried for chunk in self.stored.chunks(i))

    def write(self, job: _Job) -> dict[_Job, _Span]:
        """Decode and write a chunk, and those that it carries."""
        index, chunk = job
        stored, device, scratch = self.stored, self.where.device, self.where.scratch
        done: dict[_Job, _Span] = {}
        companions: dict[str, Tensor] = {}
        with self.where.running():
            for role, other in self._beside.get(index, {}).items():
                companions[role] = stored.decode_chunk(other, chunk, Decoding(device, scratch.beside))
                done[other, chunk] = self._put(other, chunk, [companions[role]])
            pieces = stored.decode_pieces(index, chunk, Decoding(device, scratch, companions or None))
            done[job] = self._put(index, chunk, (piece for _, piece in pieces))
        return done

    def _put(self, index: int, chunk: int, pieces: Iterable[Tensor]) -> _Span:
        item = self.stored.reader.items[index]
        start, nbytes, crc = self._offsets[index] + item.chunks[chunk].start * item.dtype.itemsize, 0, 0
        for piece in pieces:
            data = memory(piece)
            write_exactly(self.fd, start + nbytes, data)
            nbytes, crc = nbytes + len(data), zlib_ng.crc32(data, crc) if self.checked else 0
        return start, nbytes, crc

    def in_order(self, written: Iterable[dict[_Job, _Span]]) -> Iterator[_Span]:
        """Every span in the order of the file; carried ones are held back until their turn."""
        waiting, results = dict[_Job, _Span](), iter(written)
        for index in self._offsets:
            for chunk in self.stored.chunks(index):
                if index not in self._carried:
                    waiting.update(next(results))
                yield waiting.pop((index, chunk))


def _write_crc(fd: int, span: Crc32, crc: int) -> None:
    for at in span.at:
        write_exactly(fd, at, memoryview(struct.pack("<I", crc)))


def _touches(crc: Crc32, lossy: list[tuple[int, int]]) -> bool:
    """Whether a span holds bytes of a lossy region (disjoint, by offset)."""
    index = bisect_left(lossy, (crc.offset + crc.nbytes,)) - 1
    return index >= 0 and sum(lossy[index]) > crc.offset
