"""What the service refuses, and how it says so: RFC 9457 problem documents with stable codes.

The library's own codes (statecodec/errors.py) appear unchanged as the `code` of a failed job. These are the service's:

    code                status
    auth.missing        401     no bearer token
    auth.invalid        401     unknown, revoked or expired token or download link
    auth.origin         403     a browser page of another site asked
    not_found           404     nothing there, or not yours: the answer is the same
    method              405     no such method on this resource
    usage               422     the request does not say what it must
    job.conflict        409     the job is not in a state for that
    job.key_reused      422     an Idempotency-Key came back with another request
    job.limit           429     too many unfinished jobs
    job.memory, job.timeout, job.crashed, job.input        how a job fails beside the library's own errors
    internal                    the service or the library failed in a way it should not; the log says how
    upload.offset       409     PATCH at another offset than the upload's
    upload.locked       423     another request is still writing this upload
    upload.incomplete   409     the upload is not whole yet
    upload.length       400     the body is longer or shorter than announced
    upload.checksum     460     the body does not match its checksum (tus)
    upload.digest       422     the whole does not match the digest announced for it
    upload.gone         410     expired or refused
    upload.limit        429     too many uploads
    tus.version         412     another protocol version than 1.0.0
    body.type           415     another content type than the route takes, or an encoded body
    body.size           413     larger than this service takes
    body.timeout        408     no byte came for too long
    header.size         431     the request line and the headers are longer than 32 KiB
    range               416     no such range
    storage.full        507     not enough disk space
    storage.quota       507     the token's or the service's quota is used up
    storage.failed      503     the storage refused to write or read
    database            503     the database cannot be reached
    unavailable         503     the service is shutting down, or a limit on streams is reached
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

log = logging.getLogger("statecodec.server")

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
HEAD_BYTES = 32 << 10  # request line and headers
_BY_STATUS = {404: "not_found", 405: "method", 413: "body.size", 415: "body.type"}


class HTTPProblem(Exception):
    """A deliberate refusal: HTTP status, stable code, a sentence for people, further members and headers."""

    def __init__(
        self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.headers, self.members = dict(headers or {}), members

    def document(self) -> dict[str, Any]:
        """The JSON members of the problem document."""
        title = "Checksum Mismatch" if self.status == 460 else HTTPStatus(self.status).phrase
        return {
            "type": f"urn:statecodec:problem:{self.code}",
            "title": title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.members,
        }

    def response(self) -> Response:
        """The problem as an answer."""
        # Escaped to ASCII, so that nothing a client sent can keep its own refusal from being written.
        return Response(json.dumps(self.document()), self.status, {**self.headers}, "application/problem+json")


def not_found(noun: str) -> HTTPProblem:
    """The same answer for things that are not there and for things of other tokens."""
    return HTTPProblem(404, "not_found", f"There is no such {noun}, or it is not yours.")


def head_too_long() -> HTTPProblem:
    """431: the request line and the headers together."""
    return HTTPProblem(431, "header.size", f"Request line and headers may have {HEAD_BYTES:,} bytes together.")


def storage_problem(error: OSError) -> HTTPProblem:
    """Turn a failed write into 507 when the disk is full and 503 otherwise."""
    if error.errno in FULL_ERRNOS:
        return HTTPProblem(507, "storage.full", "The disk of this service is full; what was acknowledged is safe.")
    if error.errno == errno.EROFS:
        return HTTPProblem(507, "storage.full", "The storage of this service is read-only at the moment.")
    return HTTPProblem(503, "storage.failed", f"The storage failed: {error.strerror or 'input/output error'}.")


def _describe(error: RequestValidationError) -> HTTPProblem:
    errors = [
        {"where": ".".join(str(part) for part in item["loc"]), "what": item["msg"]} for item in error.errors()[:20]
    ]
    first = errors[0]
    return HTTPProblem(422, "usage", f"{first['where']}: {first['what']}", errors=errors)


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""

    async def problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPProblem)
        return error.response()

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _describe(error).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _BY_STATUS.get(error.status_code, "usage")
        return HTTPProblem(error.status_code, code, str(error.detail), headers=error.headers).response()

    async def storage(_: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        log.error("storage failed: %s", error)
        return storage_problem(error).response()

    async def database(_: Request, error: Exception) -> Response:
        log.error("database failed: %s", error)
        text = "The database of this service cannot be written at the moment."
        full = "disk is full" in str(error) or "readonly database" in str(error)
        return HTTPProblem(507 if full else 503, "storage.full" if full else "database", text).response()

    app.add_exception_handler(HTTPProblem, problem)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(OSError, storage)
    app.add_exception_handler(DBAPIError, database)
