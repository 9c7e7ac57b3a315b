"""Tells whether a file's manifest contains some text, without building what the manifest describes."""

from __future__ import annotations

import contextlib
from pathlib import Path

from statecodec.format.manifest import manifest_text
from statecodec.format.open_files import OpenFiles
from statecodec.limits import Limits
from statecodec.strict import dump_json


def mentions(path: Path, texts: tuple[str, ...], limits: Limits | None = None) -> bool:
    """Whether one of these is a JSON string in the manifest of a file. False for a shard without a manifest.

    Raises FormatError. The manifest's checksum is not looked at: whoever opens the file does that.
    """
    limits = limits or Limits()
    with contextlib.closing(OpenFiles()) as files:
        data = files.manifest(0, files.open_shard(path, limits), path.name, limits)
    if data is None:
        return False
    text = manifest_text(data, limits)
    return any(_is_text(wanted) and dump_json(wanted) in text for wanted in texts)


def _is_text(name: str) -> bool:
    """Whether UTF-8 can hold it: file names may be other bytes, which no manifest holds."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in name)
