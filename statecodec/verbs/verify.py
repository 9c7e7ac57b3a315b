"""`verify`: whether a file is intact, and whether it is a compression of a given original."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from statecodec import codecs
from statecodec.checkpoint.base import Checkpoint, TensorInfo
from statecodec.checkpoint.digests import FileHashes, FileToHash
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.report import DiffReport, Report
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.choose.chooser import is_finest
from statecodec.errors import CorruptFile, FormatError, VerificationFailed
from statecodec.figures import percent
from statecodec.parallel import default_threads, ordered_map
from statecodec.progress import Meter, Progress
from statecodec.verbs.diff import compare
from statecodec.verbs.step_errors import TRAINED_ROLES

_SHOWN = 5
_ROUNDING = 1.001  # the two ways of summing an error agree within this factor


def verify(
    src: str | Path,
    against: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check every checksum of a compressed checkpoint, and optionally compare it with its original.

    Of a link of a chain, every earlier file is checked as well. With an original, names, shapes and all bytes outside
    tensors must be the same, tensors that were stored losslessly must be equal, the error of every lossy tensor must be
    what the file states, and the errors of the Adam update, of momenta and of weights no larger than what was asked
    for, but for weights in 24 bits. Where the SHA-256 of a single file is stored, it must match; without it an original
    counts that differs by far less than those errors.

    Args:
        src: The compressed checkpoint.
        against: The original.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report of the checkpoint; with an original, also the errors of the Adam updates and the totals.

    Raises:
        CorruptFile: If a checksum does not match.
        VerificationFailed: If the file is intact, but no such compression of the original.
        FormatError: If the file cannot be read.
        LayoutError: If the original cannot be read.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"w": torch.ones(8, 4)}, f"{folder}/ckpt.pt")
        ...     _ = statecodec.compress(f"{folder}/ckpt.pt")
        ...     report = statecodec.verify(f"{folder}/ckpt.sc.safetensors", against=f"{folder}/ckpt.pt")
        >>> report.total
        {'weight_relative_rms': 0.0}
    """
    started = time.perf_counter()
    workers = threads or default_threads()
    with StoredCheckpoint.open(src) as stored:
        check_intact(stored, workers, progress)
        report = stored.report()
        if against is not None:
            with open_checkpoint(against) as original:
                report = report_against(stored, original, workers, progress)
            _check_digest(report, Path(against))
    return replace(report, seconds=time.perf_counter() - started)


def check_intact(stored: StoredCheckpoint, threads: int, progress: Progress | None = None) -> None:
    """Read every chunk of a compressed checkpoint, and of the files that it builds on. Raises CorruptFile."""
    reader = stored.reader
    meter = Meter(progress, sum(item.stored_nbytes for item in reader.items), "verifying")
    chunks = ((item, chunk) for item in stored.items for chunk in stored.chunks(item.index))
    damaged: dict[str, FormatError] = {}

    def attempt(job: tuple[TensorInfo, int]) -> tuple[TensorInfo, int, FormatError | None]:
        item, chunk = job
        try:
            reader.read_chunk(item.index, chunk)
        except FormatError as error:
            return item, chunk, error
        return item, chunk, None

    with ordered_map(attempt, chunks, threads) as attempts:
        for item, chunk, error in attempts:
            meter.add(reader.items[item.index].chunks[chunk].nbytes)
            if error is not None:
                damaged.setdefault(item.name, error)
    if damaged:
        more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        shown = "; ".join(f"{name}: {error}" for name, error in list(damaged.items())[:_SHOWN])
        raise CorruptFile(f"{stored.path}: {len(damaged)} damaged tensors: {shown}{more}")
    if stored.document.base is not None:
        check_intact(stored.base, threads, progress)


def report_against(
    stored: StoredCheckpoint, original: Checkpoint, threads: int, progress: Progress | None = None
) -> Report:
    """The report of a compressed checkpoint, with the errors against its original. Raises VerificationFailed."""
    report, comparison = stored.report(), compare(original, stored, threads, progress, checksums=True)
    complaints = [*_complaints(stored, comparison), *_update_complaints(stored, comparison)]
    _refuse(complaints, f"not a compression of {original.path}")
    _refuse([*_broken_promises(stored, original, comparison)], "not as near as was promised")
    return replace(report, updates=comparison.updates, total=comparison.total)


def _broken_promises(stored: StoredCheckpoint, original: Checkpoint, comparison: DiffReport) -> Iterator[str]:
    """What is further off than was asked for when the file was made: the updates in total, momenta and weights."""
    asked = stored.document.asked or {}
    errors = [("update", "u_rms", comparison.total.get("u_rms"))]
    for tensor in comparison.tensors:
        if tensor.name in original.lone_momenta:
            errors.append((tensor.name, "u_rms", tensor.step_error))
        elif tensor.role in TRAINED_ROLES:
            errors.append((tensor.name, "weight_step_error", tensor.step_error))
    for name, promise, error in errors:
        most = asked.get(promise)
        if most is None or error is None or error <= most * _ROUNDING or _is_finest(stored, original, name):
            continue
        yield f"{name}: step error {percent(error)} is above the {percent(most)} that was asked for"


def _is_finest(stored: StoredCheckpoint, original: Checkpoint, name: str) -> bool:
    """Whether a tensor is a weight in 24 bits, which are coarser than what was asked for where its steps are small."""
    if not isinstance(original, SourceCheckpoint) or name not in original.tensors:
        return False
    index = original.tensors[name].index
    return is_finest(original, original.items[index], stored.stored_as(stored.tensors[name].index).codec)


def _complaints(stored: StoredCheckpoint, comparison: DiffReport) -> list[str]:
    """Differences from the original that are larger than the file states."""
    complaints = [f"{name} is only in the original" for name in comparison.only_in_a]
    complaints += [f"{name} is only in the compressed file" for name in comparison.only_in_b]
    complaints += [f"{name} has another shape or dtype in the original" for name in comparison.not_comparable]
    complaints += [f"{name}: bytes that are not tensors differ" for name in comparison.rest_differs]
    for tensor in comparison.tensors:
        index = stored.tensors[tensor.name].index
        expected, encoding = stored.report_of(tensor.name), stored.stored_as(index)
        if tensor.mismatched and not isinstance(encoding.codec, codecs.Dropped):
            complaints.append(f"{tensor.name}: {tensor.mismatched} elements are NaN or infinite on one side only")
        elif stored.is_exact(index) and not tensor.identical:
            amount = f"in {tensor.differing} elements" if tensor.differing else f"by up to {tensor.max_abs:.3g}"
            complaints.append(f"{tensor.name}: stored losslessly, yet differs {amount}")
        elif "rms" in (error := expected.error or {}) and not math.isclose(
            tensor.rms, error["rms"], rel_tol=1e-3, abs_tol=1e-30
        ):
            complaints.append(f"{tensor.name}: error {tensor.rms:.6g} rms, the file says {error['rms']:.6g}")
    return complaints


def _update_complaints(stored: StoredCheckpoint, comparison: DiffReport) -> list[str]:
    """First moments that are stored as directions, whose update is further off than the file says."""
    by_moment = {update.exp_avg: update.u_rms for update in comparison.updates}
    complaints = []
    for m in stored.moments:
        error = stored.report_of(m.exp_avg).error or {}
        promised, reached = error.get("step_error"), by_moment.get(m.exp_avg)
        if "rms" in error or promised is None or reached is None:
            continue
        if not math.isclose(reached, promised, rel_tol=1e-2, abs_tol=1e-6):
            complaints.append(f"{m.exp_avg}: step error {percent(reached)}, the file says {percent(promised)}")
    return complaints


def _check_digest(report: Report, original: Path) -> None:
    """Compare a single file with the SHA-256 of the file that was compressed."""
    digest = report.source.get("sha256")
    if not digest or not original.is_file():
        return
    hashes = FileHashes([FileToHash(original, original.stat().st_size)])
    hashes.start()
    (sha256,) = hashes.digests()
    if sha256 != digest:
        why = f"not a compression of {original}"
        _refuse([f"the original's SHA-256 is {sha256}, the file was made from {digest}"], why)


def _refuse(complaints: Sequence[str], why: str) -> None:
    if complaints:
        more = f" and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else ""
        raise VerificationFailed(f"{why}: {'; '.join(complaints[:_SHOWN])}{more}")
