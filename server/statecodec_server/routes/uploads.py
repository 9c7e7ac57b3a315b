"""Uploads: tus 1.0.0 (core, creation, creation-with-upload, expiration, checksum, termination), and a plain PUT."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from email.utils import formatdate
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.responses import JSONResponse

from .. import schemas
from ..context import Here, Who
from ..digests import CHECKSUMS, Checksum, announced_sha256, repr_digest
from ..names import display_name
from ..problems import HTTPProblem
from ..receiving import never
from ..schemas import Identity, upload_document
from ..uploads import NewUpload

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,expiration,checksum,termination"
BODY = "application/offset+octet-stream"
MAX_LENGTH = 1 << 60
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "content": {"application/problem+json": {}}}
    for status in (400, 401, 403, 404, 408, 409, 410, 412, 413, 415, 422, 423, 429, 460, 503, 507)
}
router = APIRouter(prefix="/v1/uploads", tags=["uploads"], responses=PROBLEMS)


def tus_version(tus_resumable: Annotated[str | None, Header()] = None) -> None:
    """Refuse clients that speak another tus."""
    if tus_resumable != VERSION:
        headers = {"Tus-Version": VERSION, "Tus-Resumable": VERSION}
        raise HTTPProblem(
            412, "tus.version", f"This service speaks tus {VERSION}: send Tus-Resumable.", headers=headers
        )


Tus = Depends(tus_version)


def _number(text: str | None, name: str) -> int:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > MAX_LENGTH:
        raise HTTPProblem(400, "usage", f"{name} must be a whole number of bytes, not {text!r}.")
    return int(text)


def _metadata(field: str) -> dict[str, str]:
    """Upload-Metadata: comma-separated `key base64` pairs."""
    if len(field) > 8192:
        raise HTTPProblem(400, "usage", "Upload-Metadata is longer than 8192 characters.")
    pairs: dict[str, str] = {}
    for pair in field.split(",") if field.strip() else ():
        key, _, value = pair.strip().partition(" ")
        if not key or key in pairs:
            raise HTTPProblem(400, "usage", "Upload-Metadata has an empty or repeated key.")
        try:
            pairs[key] = base64.b64decode(value, validate=True).decode("utf-8", errors="replace")
        except binascii.Error:
            raise HTTPProblem(400, "usage", f"The value of {key[:40]!r} in Upload-Metadata is not base64.") from None
    return pairs


def _tus_headers(row: Mapping[str, Any]) -> dict[str, str]:
    headers = {
        "Tus-Resumable": VERSION,
        "Upload-Offset": str(row["offset"]),
        "Upload-Expires": formatdate(row["expires"], usegmt=True),
        "Cache-Control": "no-store",
    }
    if row["state"] == "ready":
        headers["Repr-Digest"] = repr_digest(row["sha256"])
    return headers


def _refuse_wrong_digest(row: Mapping[str, Any]) -> None:
    if row["state"] == "refused":
        raise HTTPProblem(
            422,
            "upload.digest",
            f"The whole has SHA-256 {row['sha256']}, announced was {row['announced']}. It was not kept.",
            headers={"Tus-Resumable": VERSION},
        )


def _checksum(field: str | None) -> Checksum | None:
    return None if field is None else Checksum(field)


def _body_fits(request: Request, offset: int, length: int) -> None:
    announced = request.headers.get("content-length")
    if announced is not None and announced.isdigit() and offset + int(announced) > length:
        raise HTTPProblem(400, "upload.length", f"The body would end beyond the {length:,} bytes of this upload.")


@router.options("", include_in_schema=False)
@router.options("/{rest:path}", include_in_schema=False)
async def options(here: Here) -> Response:
    """What this tus server can do."""
    headers = {
        "Tus-Resumable": VERSION,
        "Tus-Version": VERSION,
        "Tus-Extension": EXTENSIONS,
        "Tus-Max-Size": str(int(here.settings.max_upload)),
        "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
    }
    return Response(status_code=204, headers=headers)


@router.post("", status_code=201, dependencies=[Tus])
@router.post("/", status_code=201, dependencies=[Tus], include_in_schema=False)
async def create(
    request: Request,
    here: Here,
    who: Who,
    upload_length: Annotated[str | None, Header()] = None,
    upload_metadata: Annotated[str, Header()] = "",
    upload_checksum: Annotated[str | None, Header()] = None,
    repr_digest: Annotated[str | None, Header()] = None,
) -> Response:
    """Create an upload; with a body of type application/offset+octet-stream, fill its beginning at once."""
    length = _number(upload_length, "Upload-Length")
    metadata = _metadata(upload_metadata)
    checksum = _checksum(upload_checksum)
    with_body = request.headers.get("content-type", "").split(";")[0].strip().lower() == BODY
    if with_body:
        _body_fits(request, 0, length)
    new = NewUpload(
        display_name(metadata.get("filename")),
        length,
        upload_metadata,
        announced_sha256(repr_digest, metadata.get("sha256")),
    )
    row = await run_sync(here.uploads.create, who, new)
    base = here.settings.public_url or str(request.base_url)
    location = f"{base.rstrip('/')}/v1/uploads/{row['id']}"
    try:
        if with_body or length == 0:
            body = request.stream() if with_body else never()
            row = await here.uploads.append(who, row["id"], 0, body, checksum)
    except HTTPProblem as problem:
        if problem.code in ("body.timeout", "unavailable"):
            problem.headers |= {"Location": location}
        raise
    _refuse_wrong_digest(row)
    return Response(status_code=201, headers={"Location": location, **_tus_headers(row)})


@router.head("/{upload}", dependencies=[Tus])
async def offset(here: Here, who: Who, upload: Annotated[Identity, Path()]) -> Response:
    """Where to go on. Whatever was still writing this upload is stopped first, so the answer stays true."""
    row = await here.uploads.settle(who, upload)
    headers = _tus_headers(row)
    if row["length"] is not None:
        headers["Upload-Length"] = str(row["length"])
    if row["metadata"]:
        headers["Upload-Metadata"] = row["metadata"]
    if row["state"] == "refused":
        raise HTTPProblem(410, "upload.gone", "This upload was refused: its digest was wrong.", headers=headers)
    return Response(status_code=200, headers=headers)


@router.patch("/{upload}", status_code=204, dependencies=[Tus])
async def append(
    request: Request,
    here: Here,
    who: Who,
    upload: Annotated[Identity, Path()],
    upload_offset: Annotated[str | None, Header()] = None,
    upload_checksum: Annotated[str | None, Header()] = None,
) -> Response:
    """Send bytes from the acknowledged offset on. What a 204 acknowledges is on disk, fsynced."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != BODY:
        raise HTTPProblem(415, "body.type", f"PATCH takes {BODY}.")
    start, checksum = _number(upload_offset, "Upload-Offset"), _checksum(upload_checksum)
    row = await run_sync(here.uploads.get, who, upload)
    if row["length"] is not None and start == row["offset"]:  # another offset is refused as such, below
        _body_fits(request, start, row["length"])
    row = await here.uploads.append(who, upload, start, request.stream(), checksum)
    _refuse_wrong_digest(row)
    return Response(status_code=204, headers=_tus_headers(row))


@router.delete("/{upload}", status_code=204)
async def delete(here: Here, who: Who, upload: Annotated[Identity, Path()]) -> Response:
    """Remove an upload, finished or not, and free its space."""
    await here.uploads.delete(who, upload)
    return Response(status_code=204, headers={"Tus-Resumable": VERSION})


@router.put("/{name}", status_code=201, response_model=schemas.Upload)
async def put(
    request: Request,
    here: Here,
    who: Who,
    name: Annotated[str, Path(max_length=255)],
    repr_digest: Annotated[str | None, Header()] = None,
    content_digest: Annotated[str | None, Header()] = None,
) -> Response:
    """Send a whole file as one raw body (`curl -T ckpt.pt URL/v1/uploads/`).

    Each PUT makes a new upload; the name is only shown. It cannot be resumed: use tus for that.
    """
    text = request.headers.get("content-length")
    length = None if text is None else _number(text, "Content-Length")
    announced = announced_sha256(repr_digest or content_digest)
    row = await run_sync(here.uploads.create, who, NewUpload(display_name(name), length, "", announced))
    try:
        row = await here.uploads.append(who, row["id"], 0, request.stream(), None)
        _refuse_wrong_digest(row)
    except BaseException:
        await here.uploads.delete(who, row["id"])
        raise
    headers = {"Location": f"/v1/uploads/{row['id']}"}
    return JSONResponse(upload_document(row), 201, headers)


@router.get("/{upload}", response_model=schemas.Upload)
async def show(here: Here, who: Who, upload: Annotated[Identity, Path()]) -> Response:
    """The state of an upload, without disturbing it."""
    row = await run_sync(here.uploads.get, who, upload)
    return JSONResponse(upload_document(row), headers={"Cache-Control": "no-store"})


@router.get("", response_model=list[schemas.Upload])
@router.get("/", include_in_schema=False)
async def mine(here: Here, who: Who) -> Response:
    """The newest 200 uploads of this token."""
    rows = await run_sync(here.uploads.newest, who)
    return JSONResponse([upload_document(row) for row in rows], headers={"Cache-Control": "no-store"})
