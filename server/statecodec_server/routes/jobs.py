"""Jobs: submit once per Idempotency-Key, watch by polling or by events, cancel, delete."""

from __future__ import annotations

import hashlib
import logging
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from .. import logs, schemas
from ..context import Context, Here, Who
from ..operations import offers
from ..problems import HTTPProblem
from ..records import ENDED
from ..schemas import Identity, JobRequest, job_document
from ..tokens import Principal

log = logging.getLogger("statecodec.server.jobs")
NO_STORE = {"Cache-Control": "no-store"}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "content": {"application/problem+json": {}}}
    for status in (400, 401, 403, 404, 409, 410, 413, 422, 429, 503, 507)
}
router = APIRouter(prefix="/v1", tags=["jobs"], responses=PROBLEMS)


@router.get("/operations", response_model=list[schemas.OperationDocument])
async def operations(here: Here, who: Who) -> Response:
    """What jobs can do here, with a JSON schema of each operation's options."""
    documents = [
        {
            "name": name,
            "summary": offer.summary,
            "other": offer.other,
            "other_help": offer.other_help,
            "other_required": offer.other_needed,
            "makes_files": offer.makes_files,
            "options": offer.schema(),
        }
        for name, offer in (await run_sync(offers, here.settings.backend)).items()
    ]
    return JSONResponse(documents)


@router.get("/token", response_model=schemas.Token)
async def token(who: Who) -> Response:
    """Whose token this is: the name it was made under."""
    return JSONResponse({"name": who.name}, headers=NO_STORE)


def _create(here: Context, who: Principal, request: JobRequest, key: str | None) -> tuple[dict[str, Any], bool]:
    fingerprint = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    row = None if key is None else here.jobs.find(who, key, fingerprint)
    created = False
    if row is None:
        document, nbytes = here.inputs.resolve(who, request)
        here.quotas.check(who.id, 0)
        row, created = here.jobs.create(who, document, fingerprint, key, nbytes)
    # The row is the promise. Should this process die here, housekeeping submits it again.
    if row["state"] == "queued":
        here.queue.submit(row["id"], who.id)
    return job_document(row), created


@router.post(
    "/jobs",
    status_code=202,
    response_model=schemas.Job,
    responses={200: {"model": schemas.Job, "description": "this Idempotency-Key has made a job before: here it is"}},
)
async def create(
    here: Here,
    who: Who,
    request: JobRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Submit a job. Send an Idempotency-Key, and a repeated request finds the same job instead of making another."""
    if here.draining:
        raise HTTPProblem(503, "unavailable", "This service is shutting down.", headers={"Retry-After": "10"})
    document, created = await run_sync(_create, here, who, request, idempotency_key)
    logs.job_id.set(document["id"])
    if created:
        log.info("a job was submitted", extra={"fields": {"operation": document["operation"], "token": who.id}})
    return JSONResponse(document, 202 if created else 200, {"Location": document["links"]["self"], **NO_STORE})


@router.get("/jobs", response_model=list[schemas.Job])
async def mine(here: Here, who: Who) -> Response:
    """The newest 200 jobs of this token."""
    rows = await run_sync(here.jobs.newest, who)
    return JSONResponse([job_document(row) for row in rows], headers=NO_STORE)


@router.get("/jobs/{job}", response_model=schemas.Job)
async def show(here: Here, who: Who, job: Annotated[Identity, Path()]) -> Response:
    """A job now."""
    row = await run_sync(here.jobs.get, who, job)
    headers = NO_STORE if row["state"] in ENDED else {**NO_STORE, "Retry-After": "1"}
    return JSONResponse(job_document(row), headers=headers)


@router.get(
    "/jobs/{job}/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}}
)
async def events(here: Here, who: Who, job: Annotated[Identity, Path()]) -> Response:
    """The job as it goes: `progress` events, then one `end` event; each carries the job document."""
    row = await run_sync(here.jobs.get, who, job)
    here.watcher.check()
    headers = {**NO_STORE, "X-Accel-Buffering": "no"}
    return StreamingResponse(here.watcher.stream(row), headers=headers, media_type="text/event-stream")


def _cancel(here: Context, who: Principal, job: str) -> dict[str, Any]:
    row = here.jobs.get(who, job)
    if row["state"] in ENDED:
        raise HTTPProblem(409, "job.conflict", f"The job has {row['state']} already.")
    if here.jobs.ask_cancel(job) == "cancelled":
        here.queue.cancel(job)
    return job_document(here.jobs.read(job))


@router.post("/jobs/{job}/cancel", status_code=202, response_model=schemas.Job)
async def cancel(here: Here, who: Who, job: Annotated[Identity, Path()]) -> Response:
    """Stop a job: at once when it has not begun, within a second or so otherwise."""
    return JSONResponse(await run_sync(_cancel, here, who, job), 202, NO_STORE)


def _delete(here: Context, who: Principal, job: str) -> None:
    row = here.jobs.get(who, job)
    if row["state"] not in ENDED:
        here.jobs.ask_cancel(job)
        row = here.jobs.read(job)
    if row["state"] not in ENDED:
        raise HTTPProblem(409, "job.conflict", "The job is being cancelled; delete it when it has ended.")
    here.storage.delete(f"results/{job}")
    here.jobs.delete(job)
    here.queue.forget([job])


@router.delete("/jobs/{job}", status_code=204)
async def delete(request: Request, here: Here, who: Who, job: Annotated[Identity, Path()]) -> Response:
    """Remove an ended job with its result and free the space; cancels a job that still runs and answers 409."""
    await run_sync(_delete, here, who, job)
    return Response(status_code=204)
