"""Client-chosen names: shown back to the client, and never a path of the service.

Objects and spool files lie under random ids. Only inside a job's own folder do names appear: one file gets a
*cleaned* name, and the members of a directory checkpoint, whose names matter to the layout, are *checked* - anything
but plain components is refused, not repaired.
"""

from __future__ import annotations

import re
import urllib.parse

from .problems import HTTPProblem

_MEMBER = re.compile(r"[A-Za-z0-9_.@+=-][A-Za-z0-9_.@+= -]{0,199}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_DEPTH = 12


def display_name(text: str | None, default: str = "checkpoint") -> str:
    """A name to show and to offer for saving: last component, printable, at most 200 characters."""
    if not text:
        return default
    last = _UNPRINTABLE.sub("", text).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].strip()
    return last[:200] or default


def clean_name(text: str) -> str:
    """A file name made of harmless ASCII only, for use inside a job's own folder."""
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[-120:].lstrip(".-_")
    return cleaned or "checkpoint"


def member_path(text: str) -> str:
    """A checked relative path inside a directory checkpoint; raises a 422 problem."""
    parts = text.split("/")
    plain = all(_MEMBER.fullmatch(part) and part not in (".", "..") and part == part.strip() for part in parts)
    if not plain or len(parts) > MAX_DEPTH:
        raise HTTPProblem(422, "usage", f"{display_name(text)!r} cannot be a path inside a directory checkpoint.")
    return text


def check_members(paths: list[str]) -> None:
    """Raises a 422 problem unless the paths can lie in one folder together."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise HTTPProblem(422, "usage", f"{path!r} is named twice.")
        seen.add(path)
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in seen:
                raise HTTPProblem(422, "usage", f"{'/'.join(parts[:depth])!r} is a file and a folder at once.")


def content_disposition(name: str) -> str:
    """An attachment header that every browser reads the same way (RFC 6266)."""
    ascii_name = re.sub(r"[^A-Za-z0-9 _.()\[\]-]", "_", name) or "download"
    return f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"
