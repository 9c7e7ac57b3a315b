"""Is the file intact, and is it a compression of that original?"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from statecodec import codecs
from statecodec.checkpoint.digests import FileHashes, Watched
from statecodec.checkpoint.report import DiffReport, Report
from statecodec.checkpoint.stored import Stored
from statecodec.errors import CorruptFile, VerificationFailed
from statecodec.streams import Meter, Progress
from statecodec.verbs.diff import diff

_SHOWN = 5


def verify(src: str | Path, against: str | Path | None = None, *, progress: Progress | None = None) -> Report:
    """Check every checksum of a compressed checkpoint; with `against`, also that it is a compression of that original.

    Of a link of a chain, every earlier file is checked as well.

    Against an original: the names, shapes and non-tensor bytes must be the same, everything stored losslessly must be
    equal, every lossy tensor's error must be what the file says it is, and for a single file the SHA-256 must match.
    The returned report then carries the errors of the Adam updates and the totals. Raises CorruptFile,
    VerificationFailed, FormatError.
    """
    started = time.perf_counter()
    with Stored.open(src) as stored:
        meter = Meter(progress, sum(item.stored_nbytes for item in stored.reader.items), "verifying")
        damaged = []
        for check in stored.reader.verify():
            meter.add(check.nbytes)
            if check.error is not None:
                damaged.append(f"{check.name}: {check.error}")
        if stored.document.base is not None:
            verify(stored.base.path, progress=progress)  # what this file cannot be read without
        report = stored.report()
    if damaged:
        more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise CorruptFile(f"{src}: {len(damaged)} damaged tensors: {'; '.join(damaged[:_SHOWN])}{more}")
    if against is not None:
        comparison = diff(against, src, progress=progress)
        _check_against(report, comparison, Path(against))
        report = replace(report, updates=comparison.updates, total=comparison.total)
    return replace(report, seconds=time.perf_counter() - started)


def _check_against(report: Report, comparison: DiffReport, original: Path) -> None:
    complaints = [f"{name} is only in the original" for name in comparison.only_in_a]
    complaints += [f"{name} is only in the compressed file" for name in comparison.only_in_b]
    complaints += [f"{name} has another shape or dtype in the original" for name in comparison.not_comparable]
    complaints += [f"{name}: bytes that are not tensors differ" for name in comparison.rest_differs]
    stored = {t.name: t for t in report.tensors}
    for tensor in comparison.tensors:
        expected = stored[tensor.name]
        codec = codecs.parse(expected.codec)
        lossless = codecs.is_exact(codec)
        if tensor.mismatched and not isinstance(codec, codecs.Dropped):
            complaints.append(f"{tensor.name}: {tensor.mismatched} elements are NaN or infinite on one side only")
        elif lossless and not tensor.identical:
            amount = f"in {tensor.differing} elements" if tensor.differing else f"by up to {tensor.max_abs:.3g}"
            complaints.append(f"{tensor.name}: stored losslessly, yet differs {amount}")
        elif "rms" in (error := expected.error or {}) and not math.isclose(
            tensor.rms, error["rms"], rel_tol=1e-3, abs_tol=1e-30
        ):
            complaints.append(f"{tensor.name}: error {tensor.rms:.6g} rms, the file says {error['rms']:.6g}")
    digest = report.source.get("sha256")
    if digest and not complaints and original.is_file():
        hashes = FileHashes([Watched(original, original.stat().st_size)])
        hashes.start()
        (found,) = hashes.digests()
        if found != digest:
            complaints.append(f"the original's SHA-256 is {found}, the file was made from {digest}")
    if complaints:
        more = f" and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else ""
        raise VerificationFailed(f"not a compression of {original}: {'; '.join(complaints[:_SHOWN])}{more}")
