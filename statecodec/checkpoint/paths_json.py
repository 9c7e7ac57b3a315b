"""Paths in JSON: as text, or as bytes where they are no Unicode; and which of them are safe to create."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any

from statecodec.errors import FormatError


def path_to_json(path: str) -> str | dict[str, str]:
    """A path as text; one that is not UTF-8, which JSON cannot hold, as its bytes in hexadecimal."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return {"bytes": os.fsencode(path).hex()}
    return path


def path_from_json(value: Any) -> str:
    """The inverse of `path_to_json`. Raises FormatError."""
    if isinstance(value, dict) and set(value) == {"bytes"} and isinstance(value["bytes"], str):
        try:
            return os.fsdecode(bytes.fromhex(value["bytes"]))
        except ValueError:
            raise FormatError(f"path {value['bytes'][:80]!r} in the document is not hexadecimal") from None
    if not isinstance(value, str):
        raise FormatError(f"{str(value)[:80]!r} in the document is not a path")
    return value


def safe_path(path: str) -> str:
    """A relative path that stays inside its folder; raises FormatError for any other."""
    parts = PurePosixPath(path).parts
    if (
        not path
        or path.startswith("/")
        or ".." in parts
        or "\0" in path
        or (os.sep != "/" and os.sep in path)
        or str(PurePosixPath(path)) != path
        or path == "."
    ):
        raise FormatError(f"unsafe path {path[:200]!r} in the document")
    return path
