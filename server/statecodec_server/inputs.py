"""From what a client asks for to what a worker will read: every input checked for existence and ownership."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from statecodec.errors import UsageError

from . import fetch
from .database import Database, uploads
from .names import check_members, clean_name, display_name, member_path
from .operations import offers
from .problems import HTTPProblem, not_found
from .records import Jobs
from .schemas import InputSource, JobRequest, Member
from .settings import Settings
from .storage import bucket_files
from .tokens import Principal


class Inputs:
    """Turns requests into the document that a job row keeps and its worker reads."""

    def __init__(self, settings: Settings, database: Database, jobs: Jobs) -> None:
        self._settings, self._database, self._jobs = settings, database, jobs

    def resolve(self, principal: Principal, request: JobRequest) -> tuple[dict[str, Any], int]:
        """(normalised request, bytes of the source); raises 404, 409 and 422 problems."""
        operation = offers(self._settings.backend).get(request.operation)
        if operation is None:
            names = ", ".join(offers(self._settings.backend))
            raise HTTPProblem(422, "usage", f"There is no operation {request.operation!r}; there are {names}.")
        try:
            options = operation.accepted(request.options)
        except UsageError as error:
            raise HTTPProblem(422, "usage", f"options: {error}") from None
        source = request.source or InputSource(upload=request.upload)
        document: dict[str, Any] = {"operation": operation.name, "options": options}
        document["source"], nbytes = self._source(principal, source)
        if request.other is not None:
            if operation.other is None:
                raise HTTPProblem(422, "usage", f"{operation.name} takes one input only.")
            document["other"], _ = self._source(principal, request.other)
        elif operation.other_needed:
            raise HTTPProblem(422, "usage", f"{operation.name} needs a second input, `other`.")
        return document, nbytes

    def _source(self, principal: Principal, source: InputSource) -> tuple[dict[str, Any], int]:
        if source.upload is not None:
            row = self._upload(principal, source.upload)
            file = {"upload": row["id"], "key": f"uploads/{row['id']}/0", "bytes": row["length"]}
            return _single(row["name"], file)
        if source.uploads is not None:
            return self._directory(principal, source.uploads)
        if source.job is not None:
            return self._result(principal, source.job)
        if source.url is not None:
            _, path = fetch.allowed_host_and_path(source.url, self._settings.fetch_hosts)
            return _single(display_name(path.split("?")[0]), {"url": source.url, "bytes": None})
        assert source.bucket is not None
        assert source.key is not None
        return self._bucket(principal, source.bucket, source.key)

    def _upload(self, principal: Principal, identity: str) -> Any:
        row = self._database.one(sa.select(uploads).where(uploads.c.id == identity, uploads.c.token == principal.id))
        if row is None:
            raise not_found("upload")
        if row["state"] == "refused":
            raise HTTPProblem(410, "upload.gone", f"The upload {identity} was refused: its digest was wrong.")
        if row["state"] == "receiving":
            raise HTTPProblem(409, "upload.incomplete", f"The upload {identity} is not complete yet.")
        return row

    def _directory(self, principal: Principal, members: list[Member]) -> tuple[dict[str, Any], int]:
        if len(members) > self._settings.max_files:
            raise HTTPProblem(
                422, "usage", f"A directory checkpoint has at most {self._settings.max_files:,} files here."
            )
        check_members([member_path(member.path) for member in members])
        files = []
        for member in members:
            row = self._upload(principal, member.upload)
            key = f"uploads/{row['id']}/0"
            files.append({"path": member.path, "upload": row["id"], "key": key, "bytes": row["length"]})
        roots = {member.path.split("/")[0] for member in members}
        name = roots.pop() if len(roots) == 1 and all("/" in member.path for member in members) else "checkpoint"
        if name != "checkpoint":
            files = [{**file, "path": file["path"].split("/", 1)[1]} for file in files]
        return {"name": name, "folder": True, "files": files}, sum(file["bytes"] for file in files)

    def _result(self, principal: Principal, identity: str) -> tuple[dict[str, Any], int]:
        row = self._jobs.get(principal, identity)
        results = json.loads(row["result"])["files"] if row["result"] else []
        if not results:
            raise HTTPProblem(409, "job.conflict", f"The job {identity} has no result to work on.")
        files = [{"path": file["name"], "key": file["key"], "bytes": file["bytes"]} for file in results]
        nbytes = sum(file["bytes"] for file in files)
        if len(files) == 1 and "/" not in files[0]["path"]:
            return _single(files[0]["path"], files[0])
        return {"name": clean_name(files[0]["path"].split("/")[0]), "folder": True, "files": files}, nbytes

    def _bucket(self, principal: Principal, name: str, key: str) -> tuple[dict[str, Any], int]:
        bucket = self._settings.buckets.get(name)
        if bucket is None or (bucket.tokens is not None and principal.name not in bucket.tokens):
            raise not_found("bucket")
        if ".." in key.split("/") or key.startswith("/"):
            raise HTTPProblem(422, "usage", "A key is a plain path inside the bucket.")
        objects = bucket_files(bucket, key, self._settings.max_files)
        files: list[dict[str, Any]] = [
            {"path": path, "bucket": name, "key": full, "bytes": nbytes} for path, full, nbytes in objects
        ]
        total = sum(nbytes for _, _, nbytes in objects)
        if total > self._settings.max_upload:
            raise HTTPProblem(413, "body.size", f"The largest input here is {int(self._settings.max_upload):,} bytes.")
        if not key.endswith("/"):
            return _single(display_name(key), files[0])
        check_members([member_path(file["path"]) for file in files])
        return {"name": display_name(key.rstrip("/")), "folder": True, "files": files}, total


def _single(name: str, file: dict[str, Any]) -> tuple[dict[str, Any], int]:
    return {"name": name, "folder": False, "files": [{**file, "path": clean_name(name)}]}, file["bytes"] or 0
