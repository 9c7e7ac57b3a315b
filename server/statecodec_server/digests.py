"""Digest fields: RFC 9530 `Repr-Digest`, tus `Upload-Checksum`, and hexadecimal SHA-256."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Any

from .problems import HTTPProblem

CHECKSUMS = ("sha1", "sha256", "md5")
_SHA256_FIELD = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([A-Za-z0-9+/=]{44}):")
_HEX = re.compile(r"[0-9a-fA-F]{64}")


def repr_digest(sha256: str) -> str:
    """The `Repr-Digest` field for a SHA-256 in hex."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def announced_sha256(field: str | None, hexadecimal: str | None = None) -> str | None:
    """The SHA-256 that a client announces, in hex, from a digest field or from metadata; None when it announces none.

    Raises a 422 problem for anything else.
    """
    if hexadecimal is not None:
        if not _HEX.fullmatch(hexadecimal):
            raise HTTPProblem(422, "upload.digest", "The announced sha256 is not 64 hexadecimal digits.")
        return hexadecimal.lower()
    if field is None:
        return None
    match = _SHA256_FIELD.search(field)
    if match is None:
        raise HTTPProblem(422, "upload.digest", "The digest field has no sha-256 (RFC 9530: sha-256=:base64:).")
    return base64.b64decode(match[1]).hex()


class Checksum:
    """One `Upload-Checksum: algorithm base64`, to compare a body with."""

    def __init__(self, field: str) -> None:
        algorithm, _, text = field.strip().partition(" ")
        if algorithm not in CHECKSUMS:
            raise HTTPProblem(400, "upload.checksum", f"Checksum algorithm {algorithm!r} is not one of {CHECKSUMS}.")
        self._digest: Any = hashlib.new(algorithm, usedforsecurity=False)
        try:
            self._expected = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise HTTPProblem(400, "upload.checksum", "The checksum is not base64.") from None
        if len(self._expected) != self._digest.digest_size:
            raise HTTPProblem(400, "upload.checksum", f"A {algorithm} checksum has {self._digest.digest_size} bytes.")

    def update(self, data: bytes) -> None:
        """Take in the next bytes of the body."""
        self._digest.update(data)

    def matches(self) -> bool:
        """Whether the body was what the client meant to send."""
        return bool(self._digest.digest() == self._expected)
