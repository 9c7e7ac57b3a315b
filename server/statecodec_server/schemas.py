"""The JSON documents of the HTTP API, as clients send and see them (OpenAPI takes its schemas from here)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-z]{26}$")]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
EXAMPLE_ID = "5f0c3e8a1b2d4c6e8f0a1b2c3d"


def _text_only(value: dict[str, Any]) -> dict[str, Any]:
    """JSON can name half a surrogate pair; no database, log or file name can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string in it is no Unicode text") from None
    return value


class Member(BaseModel):
    """One file of a directory checkpoint."""

    model_config = ConfigDict(extra="forbid")
    upload: Identity = Field(examples=[EXAMPLE_ID])
    path: ShortText = Field(examples=["checkpoint-100/optimizer.pt"])


class InputSource(BaseModel):
    """Where an input comes from: exactly one of `upload`, `uploads`, `job`, `bucket` with `key`, or `url`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"upload": EXAMPLE_ID}]})
    upload: Identity | None = Field(default=None, description="a finished upload")
    uploads: list[Member] | None = Field(default=None, min_length=1, description="the files of a directory checkpoint")
    job: Identity | None = Field(default=None, description="the result of an earlier job")
    bucket: ShortText | None = Field(default=None, description="a bucket the operator has configured")
    key: ShortText | None = Field(default=None, description="an object in it; everything below when it ends in /")
    url: ShortText | None = Field(default=None, description="an https URL of a host the operator allows")

    @model_validator(mode="after")
    def _one(self) -> InputSource:
        named = [name for name in ("upload", "uploads", "job", "bucket", "url") if getattr(self, name) is not None]
        if len(named) != 1 or (self.key is None) != (self.bucket is None):
            raise ValueError("give exactly one of upload, uploads, job, bucket with key, url")
        return self


class JobRequest(BaseModel):
    """What to do with what. `upload` is short for `source: {upload}`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"operation": "compress", "upload": EXAMPLE_ID, "options": {"preset": "resume"}}]
        },
    )
    operation: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,40}$")] = Field(examples=["compress"])
    upload: Identity | None = None
    source: InputSource | None = None
    other: InputSource | None = Field(default=None, description="compress: previous; verify: original; diff: second")
    options: Annotated[dict[str, Any], AfterValidator(_text_only)] = Field(
        default_factory=dict, description="see GET /v1/operations"
    )

    @model_validator(mode="after")
    def _one_source(self) -> JobRequest:
        if (self.upload is None) == (self.source is None):
            raise ValueError("give either upload or source")
        return self


class Progress(BaseModel):
    """How far a job is; `total` 0 while that is not known."""

    stage: str
    done: int
    total: int
    rate: float = Field(description="bytes per second")
    eta: float | None = Field(description="seconds until this stage is through, if that can be said")


class ErrorDocument(BaseModel):
    """Why a job failed: a stable code of the library or of the service, and a sentence."""

    code: str
    message: str


class ResultFile(BaseModel):
    """One file of a result."""

    name: str
    bytes: int
    sha256: str
    href: str


class Job(BaseModel):
    """A job as its owner sees it."""

    id: str
    operation: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    cancelling: bool
    name: str
    options: dict[str, Any]
    progress: Progress
    attempt: int
    created: str
    started: str | None
    finished: str | None
    expires: str
    bytes_in: int
    bytes_out: int
    error: ErrorDocument | None
    files: list[ResultFile]
    links: dict[str, str]


class Upload(BaseModel):
    """An upload as its owner sees it."""

    id: str
    name: str
    state: Literal["receiving", "finishing", "ready", "refused"]
    offset: int
    length: int | None
    sha256: str | None
    created: str
    expires: str
    links: dict[str, str]


class OperationDocument(BaseModel):
    """One thing jobs can do."""

    name: str
    summary: str
    other: str | None = Field(description="the library's name for the second input; null when there is none")
    other_help: str
    other_required: bool
    makes_files: bool
    options: dict[str, Any] = Field(description="JSON schema of the options")


class Token(BaseModel):
    """The token of this request."""

    name: str


class Problem(BaseModel):
    """RFC 9457 problem document; `code` is stable."""

    type: str
    title: str
    status: int
    detail: str
    code: str


def moment(seconds: float | None) -> str | None:
    """RFC 3339 text of a time."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_document(row: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a job row."""
    request = json.loads(row["request"])
    result = json.loads(row["result"]) if row["result"] else {"files": []}
    base = f"/v1/jobs/{row['id']}"
    links = {"self": base, "events": f"{base}/events"}
    if row["state"] == "succeeded":
        links["report"] = f"{base}/report"
        if result["files"]:
            links["result"] = f"{base}/result"
    running = row["state"] == "running"
    left = max(row["total"] - row["done"], 0)
    eta = left / row["rate"] if running and row["total"] and row["rate"] > 0 else None
    return {
        "id": row["id"],
        "operation": row["operation"],
        "state": row["state"],
        "cancelling": bool(row["cancel"]) and running,
        "name": request["source"]["name"],
        "options": request["options"],
        "progress": {
            "stage": row["stage"],
            "done": row["done"],
            "total": row["total"],
            "rate": round(row["rate"], 1) if running and math.isfinite(row["rate"]) else 0.0,
            "eta": None if eta is None else round(eta, 1),
        },
        "attempt": row["attempt"],
        "created": moment(row["created"]),
        "started": moment(row["started"]),
        "finished": moment(row["finished"]),
        "expires": moment(row["expires"]),
        "bytes_in": row["bytes_in"],
        "bytes_out": row["bytes_out"],
        "error": json.loads(row["error"]) if row["error"] else None,
        "files": [
            {**{key: file[key] for key in ("name", "bytes", "sha256")}, "href": f"{base}/files/{index}"}
            for index, file in enumerate(result["files"])
        ],
        "links": links,
    }


def upload_document(row: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of an upload row."""
    shown = ("id", "name", "state", "offset", "length", "sha256")
    return {
        **{key: row[key] for key in shown},
        "created": moment(row["created"]),
        "expires": moment(row["expires"]),
        "links": {"self": f"/v1/uploads/{row['id']}"},
    }
