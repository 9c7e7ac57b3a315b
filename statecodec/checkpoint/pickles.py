"""Finds out what unpickling a checkpoint would import, compressed or not, without unpickling it."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from statecodec.checkpoint.report import PickleReport
from statecodec.checkpoint.restored_bytes import original_listing
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.errors import FormatError, UnsafeCheckpoint
from statecodec.layouts import ListedFile
from statecodec.layouts.imports import FileImports, file_imports
from statecodec.layouts.pickle.harmless import is_harmless
from statecodec.names import shown

_LONGEST = 200
_NAMED = 10


def pickles(checkpoint: SourceCheckpoint | StoredCheckpoint) -> tuple[PickleReport, ...]:
    """For every file of the original that holds a pickle what unpickling it would import.

    Of a compressed checkpoint this is read from the bytes that `restore` would write, whatever else the file says; of a
    file whose bytes are damaged, or lack their base, it cannot be told.
    """
    if isinstance(checkpoint, SourceCheckpoint):
        return tuple(map(_report, file_imports(checkpoint.original_listing(crcs=False))))
    listing = original_listing(checkpoint)
    broken = [found for file in listing.files.values() if (found := _broken(file))]
    sound = listing.of(sorted(listing.files.keys() - {found.path for found in broken}))
    return tuple(map(_report, sorted([*file_imports(sound), *broken], key=attrgetter("path"))))


def _broken(file: ListedFile) -> FileImports | None:
    """A file whose first bytes cannot be read, and why."""
    try:
        _ = file.magic
    except FormatError as error:
        return FileImports(file.path, unread=str(error))
    return None


def safe_pickles(checkpoint: SourceCheckpoint | StoredCheckpoint) -> tuple[PickleReport, ...]:
    """Like `pickles`, but refuses a checkpoint whose unpickling could run code. Raises UnsafeCheckpoint."""
    reports = pickles(checkpoint)
    for report in reports:
        named, more = ", ".join(report.can_run_code[:_NAMED]), len(report.can_run_code) - _NAMED
        if named:
            raise UnsafeCheckpoint(
                f"{checkpoint.path}: unpickling {report.file} would import {named}"
                f"{f' and {more} more' if more > 0 else ''}, which can run code. If you trust it, leave safe_only out"
            )
        if report.unread:
            raise UnsafeCheckpoint(
                f"{checkpoint.path}: what unpickling {report.file} would run cannot be told ({report.unread}). If you "
                "trust it, leave safe_only out"
            )
    return reports


def _report(imports: FileImports) -> PickleReport:
    return PickleReport(
        shown(imports.path),
        _spelled(imports.names),
        _spelled(pair for pair in imports.names if not is_harmless(*pair)),
        imports.unread and shown(imports.unread[:_LONGEST]),
    )


def _spelled(names: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(sorted({shown(f"{module}.{name}"[:_LONGEST]) for module, name in names}))
