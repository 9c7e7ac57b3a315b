"""Results: the whole (a file, or a tar of several), one of its files, one of its tensors, the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from statecodec.suffixes import stem

from .. import schemas
from ..context import Context, Downloader, Here, Who
from ..problems import HTTPProblem, not_found
from ..ranges import serve
from ..schemas import Identity, moment
from ..segments import Segment, safetensors_header, tar_segments, tensor_segments

BINARY = "application/octet-stream"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "content": {"application/problem+json": {}}}
    for status in (401, 403, 404, 409, 412, 416, 422, 503)
}
PARTIAL: dict[int | str, dict[str, Any]] = {
    200: {"content": {BINARY: {}}, "description": "the bytes, with ETag (its SHA-256) and Repr-Digest"},
    206: {"content": {BINARY: {}}, "description": "the ranges asked for; multipart/byteranges when several"},
    304: {"description": "the ETag has not changed"},
}
router = APIRouter(prefix="/v1/jobs/{job}", tags=["results"], responses=PROBLEMS)
Job = Annotated[Identity, Path()]


def _result(here: Context, who: Any, job: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    row = here.jobs.get(who, job)
    if row["state"] != "succeeded":
        raise HTTPProblem(409, "job.conflict", f"The job has no result: it is {row['state']}.")
    return row, json.loads(row["result"])


def _files(here: Context, who: Any, job: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    row, result = _result(here, who, job)
    if not result["files"]:
        raise HTTPProblem(409, "job.conflict", f"{row['operation']} makes no files; its result is the report.")
    return row, result


@router.head("/result", include_in_schema=False)
@router.get("/result", responses=PARTIAL, response_class=Response)
async def whole(request: Request, here: Here, who: Downloader, job: Job) -> Response:
    """The result as one download. The ETag is the SHA-256; ranges, several ranges, and If-Range work."""
    row, result = await run_sync(_files, here, who, job)
    files = result["files"]
    if len(files) == 1 and "/" not in files[0]["name"]:
        return _one(request, here, files[0])
    segments = tar_segments([(file["name"], file["bytes"], file["key"]) for file in files])
    name = stem(json.loads(row["request"])["source"]["name"]) + ".tar"
    sha256 = result["tar_sha256"]
    return serve(request, here.storage, segments, tag=sha256, name=name, media_type="application/x-tar", sha256=sha256)


def _one(request: Request, here: Context, file: Mapping[str, Any]) -> Response:
    name = file["name"].rsplit("/", 1)[-1]
    segments = [Segment(file["bytes"], key=file["key"])] if file["bytes"] else []
    return serve(
        request, here.storage, segments, tag=file["sha256"], name=name, media_type=BINARY, sha256=file["sha256"]
    )


@router.head("/files/{index}", include_in_schema=False)
@router.get("/files/{index}", responses=PARTIAL, response_class=Response)
async def one_file(
    request: Request, here: Here, who: Downloader, job: Job, index: Annotated[int, Path(ge=0, le=10**6)]
) -> Response:
    """One file of the result, by its place in the job's `files`."""
    _, result = await run_sync(_files, here, who, job)
    if index >= len(result["files"]):
        raise not_found("file in this result")
    return _one(request, here, result["files"][index])


def _tensor(here: Context, result: dict[str, Any], name: str) -> tuple[list[Segment], str]:
    report = json.loads(here.storage.read(result["report"]))
    described: dict[str, Any] = next((item for item in report.get("tensors", ()) if item.get("name") == name), {})
    shown = {key: described[key] for key in ("codec", "dtype", "shape", "role") if described.get(key) is not None}
    about = {"format": "statecodec-tensor", "name": name}
    about |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in shown.items()}
    for file in result["files"]:
        try:
            header, payload = safetensors_header(here.storage, file["key"], file["bytes"])
        except ValueError:
            continue
        segments = tensor_segments(header, payload, file["key"], name, about)
        if segments is not None:
            return segments, hashlib.sha256(f"{file['sha256']}\n{name}".encode()).hexdigest()
    raise not_found("tensor in this result")


@router.head("/tensors/{name:path}", include_in_schema=False)
@router.get("/tensors/{name:path}", responses=PARTIAL, response_class=Response)
async def one_tensor(
    request: Request, here: Here, who: Downloader, job: Job, name: Annotated[str, Path(max_length=2048)]
) -> Response:
    """One tensor as it is stored, encoded, as a small safetensors file; ranges work here as well."""
    _, result = await run_sync(_files, here, who, job)
    segments, tag = await run_sync(_tensor, here, result, name)
    file = name.rsplit("/", 1)[-1][-120:] + ".safetensors"
    return serve(request, here.storage, segments, tag=tag, name=file, media_type=BINARY)


@router.get("/report", responses={200: {"content": {"application/json": {}}}}, response_class=Response)
async def report(here: Here, who: Who, job: Job) -> Response:
    """What the library reported, as JSON."""
    _, result = await run_sync(_result, here, who, job)
    data = await run_sync(here.storage.read, result["report"])
    return Response(data, media_type="application/json", headers={"Cache-Control": "private, no-cache"})


@router.post("/link", responses={200: {"content": {"application/json": {}}}})
async def link(here: Here, who: Who, job: Job) -> Response:
    """A link that opens the result without a token for a few minutes, for a browser's own download."""
    await run_sync(_files, here, who, job)
    ticket, expires = here.tokens.ticket(job, who, here.settings.ticket_ttl)
    return JSONResponse({"href": f"/v1/jobs/{job}/result?ticket={ticket}", "expires": moment(expires)})
