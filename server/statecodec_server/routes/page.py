"""The page at `/`: static files of this package, served under a policy that lets nothing else in."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from ..problems import not_found

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).parent.parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@lru_cache(maxsize=32)
def _load(name: str) -> tuple[bytes, str, str]:
    data = (FOLDER / name).read_bytes()
    kind = TYPES[Path(name).suffix]
    return data, f"{kind}; charset=utf-8", f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _serve(request: Request, name: str) -> Response:
    data, media_type, etag = _load(name)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return _serve(request, "index.html")


@router.get("/static/{name}")
async def asset(request: Request, name: str) -> Response:
    """One of the page's own files."""
    if name not in {path.name for path in FOLDER.iterdir() if path.suffix in TYPES}:
        raise not_found("file")
    return _serve(request, name)
