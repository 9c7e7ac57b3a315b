"""Where a verb writes its one file, decided and refused before any work is done."""

from __future__ import annotations

from pathlib import Path

from statecodec.checkpoint.chain import refuse_base
from statecodec.errors import OutputExists, UsageError
from statecodec.verbs.paths import INDEX_SUFFIX


def output_file(dst: str | Path | None, default: Path | None, *, force: bool) -> Path:
    """The path of a verb's one output file: `dst`; or, if that is a directory, the default's name in it.

    Raises UsageError for a directory that is not there, for a file without a name, and for a file that is the base of
    links of a chain; OutputExists for a file that is there, without `force`.
    """
    target = default if dst is None else Path(dst)
    if target is None:
        raise UsageError("say where to write")
    if dst is not None and target.is_dir():
        if default is None:
            raise UsageError(f"{dst} is a directory; name the file in it")
        target = target / default.name
    elif dst is not None and str(dst).endswith("/"):
        raise UsageError(f"there is no directory {dst}; make it first, or leave out the slash to write a file")
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "not a regular file"
        raise UsageError(f"{target} is {kind}; it is not replaced by a file")
    if force:
        refuse_base(target)
    elif target.exists() or target.with_name(target.name + INDEX_SUFFIX).exists():
        raise OutputExists(f"{target} exists; force (--force) replaces it")
    return target
