"""Serving a representation: conditional requests, single and multiple ranges (RFC 9110), digest fields."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from .digests import repr_digest
from .names import content_disposition
from .problems import HTTPProblem
from .segments import Segment, stream, total
from .storage import Storage

MAX_RANGES = 32
_SPEC = re.compile(r"(\d{0,18})-(\d{0,18})")
_ETAG = re.compile(r'(W/)?"([^"]*)"')
Range = tuple[int, int]  # first byte, number of bytes


def parse_ranges(field: str, size: int) -> list[Range] | None:
    """The satisfiable ranges asked for; None to ignore the field; raises 416 when nothing can be satisfied."""
    unit, _, specs = field.partition("=")
    if unit.strip().lower() != "bytes" or not specs:
        return None
    ranges: list[Range] = []
    items = [item.strip() for item in specs.split(",") if item.strip()]
    for item in items:
        match = _SPEC.fullmatch(item)
        if match is None or match[0] == "-":
            return None
        first, last = match[1], match[2]
        if not first:
            count = min(int(last), size)
            start, stop = size - count, size
        else:
            start, stop = int(first), min(int(last) + 1 if last else size, size)
            if last and int(last) < int(first):
                return None
        if start < stop:
            ranges.append((start, stop - start))
    if not ranges:
        raise HTTPProblem(
            416, "range", f"The representation has {size:,} bytes.", headers={"Content-Range": f"bytes */{size}"}
        )
    ordered = sorted(ranges)
    overlapping = any(a + n > b for (a, n), (b, _) in pairwise(ordered))
    # RFC 9110, 14.2: many small or overlapping ranges are an attack, and may be answered with the whole.
    return None if len(ranges) > MAX_RANGES or overlapping else ranges


def _listed(field: str, etag: str) -> bool:
    return field.strip() == "*" or any(f'"{match[2]}"' == etag for match in _ETAG.finditer(field))


def serve(
    request: Request,
    storage: Storage,
    segments: Sequence[Segment],
    *,
    tag: str,
    name: str,
    media_type: str,
    sha256: str | None = None,
) -> Response:
    """Answer GET or HEAD for the bytes that the segments describe; `tag` must change when the bytes do.

    Raises problems 412 (If-Match names other bytes) and 416 (a range outside the bytes).
    """
    size, etag = total(segments), f'"{tag}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Cache-Control": "private, no-cache",
        "Content-Disposition": content_disposition(name),
    }
    if sha256 is not None:
        headers["Repr-Digest"] = repr_digest(sha256)
    asked = request.headers
    if "if-match" in asked and not _listed(asked["if-match"], etag):
        raise HTTPProblem(412, "usage", "The result is not the one named by If-Match.")
    if "if-none-match" in asked and _listed(asked["if-none-match"], etag):
        return Response(status_code=304, headers=headers)
    ranges: list[Range] | None = None
    if request.method == "GET" and "range" in asked and asked.get("if-range", etag).strip() == etag:
        ranges = parse_ranges(asked["range"], size)
    if ranges is None:
        headers["Content-Length"] = str(size)
        body = stream(storage, segments, 0, size if request.method == "GET" else 0)
        return StreamingResponse(body, 200, headers, media_type)
    if len(ranges) == 1:
        start, length = ranges[0]
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
        headers["Content-Length"] = str(length)
        return StreamingResponse(stream(storage, segments, start, length), 206, headers, media_type)
    return _multipart(storage, segments, ranges, size, media_type, headers)


def _multipart(
    storage: Storage,
    segments: Sequence[Segment],
    ranges: list[Range],
    size: int,
    media_type: str,
    headers: dict[str, str],
) -> Response:
    boundary = secrets.token_hex(12)
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\n"
        f"Content-Range: bytes {start}-{start + length - 1}/{size}\r\n\r\n".encode()
        for start, length in ranges
    ]
    tail = f"\r\n--{boundary}--\r\n".encode()

    async def body() -> AsyncIterator[bytes]:
        for head, (start, length) in zip(heads, ranges, strict=True):
            yield head
            async for block in stream(storage, segments, start, length):
                yield block
        yield tail

    headers["Content-Length"] = str(sum(map(len, heads)) + sum(length for _, length in ranges) + len(tail))
    return StreamingResponse(body(), 206, headers, f"multipart/byteranges; boundary={boundary}")
