"""The phases of a job: stage its inputs, convert them in a child process, publish the files, end the job.

Each phase may run again after a crash, on this machine or another, and must then either find its work done or do it
over. A job's folder is `work/<job>`: `input/` and `other/` are shared by its attempts, `<attempt>/` belongs to one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from . import fetch
from .database import Database, jobs, uploads
from .names import clean_name
from .problems import FULL_ERRNOS, HTTPProblem
from .records import ENDED, Cancelled, Fenced, Jobs
from .runner import ByteRate, ChildFailed, Children
from .settings import Settings
from .storage import Storage, download

log = logging.getLogger("statecodec.server.jobs")
Row = Mapping[str, Any]
UPLOAD_PATIENCE = 3600.0


class JobPhases:
    """Everything a worker needs to carry a job through its phases."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, owner: str) -> None:
        self.settings, self.database, self.storage, self.owner = settings, database, storage, owner
        self.jobs = Jobs(settings, database)
        self.children = Children(settings)

    def folder(self, job: str) -> Path:
        """The job's folder on this machine."""
        return self.settings.data.resolve() / "work" / job

    def stage(self, row: Row) -> None:
        """Bring the inputs into the job's folder; files that are there already stay."""
        request = json.loads(row["request"])
        folder = self.folder(row["id"])
        for name in ("input", "other"):
            source = request.get("source" if name == "input" else "other")
            if source is not None:
                self._stage_source(row, source, folder / name)

    def _stage_source(self, row: Row, source: Mapping[str, Any], folder: Path) -> None:
        files = source["files"]
        for index, file in enumerate(files):
            self.jobs.progress(row, index, len(files), "fetching", 0.0)
            self._wait_until_stored(row, file)
            target = folder / clean_name(source["name"])
            if source["folder"]:
                target = target / file["path"]
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = folder.parent / f"fetching-{row['attempt']}"
            scratch.unlink(missing_ok=True)
            self._fetch(file, scratch)
            if file.get("bytes") is not None and scratch.stat().st_size != file["bytes"]:
                raise ChildFailed("job.input", f"{file['path']!r} is not as long as it was when the job was made.")
            os.replace(scratch, target)

    def _fetch(self, file: Mapping[str, Any], target: Path) -> None:
        if "url" in file:
            limit = int(self.settings.max_upload)
            fetch.download(file["url"], target, allowed=self.settings.fetch_hosts, limit=limit)
        elif "bucket" in file:
            download(self.settings.buckets[file["bucket"]], file["key"], target)
        elif (local := self.storage.local(file["key"])) is not None:
            try:
                os.link(local, target)
            except OSError:  # another file system
                shutil.copyfile(local, target)
        else:
            with target.open("wb") as out:
                for block in self.storage.blocks(file["key"]):
                    out.write(block)

    def _wait_until_stored(self, row: Row, file: Mapping[str, Any]) -> None:
        """An upload may be complete and still on its way into the store."""
        if "upload" not in file:
            return
        until = time.monotonic() + UPLOAD_PATIENCE
        while time.monotonic() < until:
            upload = self.database.one(sa.select(uploads.c.state).where(uploads.c.id == file["upload"]))
            if upload is None or upload["state"] == "refused":
                raise ChildFailed("job.input", "An input of this job is not there any more, or was refused.")
            if upload["state"] == "ready":
                return
            self.jobs.progress(row, 0, 0, "waiting for the upload to be stored", 0.0)
            time.sleep(self.settings.poll_seconds)
        raise ChildFailed("job.input", "An input of this job could not be stored in time.")

    def convert(self, row: Row, _: None = None) -> dict[str, Any]:
        """Run the operation in a child process until it succeeds, fails for good, or has crashed too often."""
        while True:
            self.stage(row)
            folder = self.folder(row["id"])
            for stale in folder.iterdir():
                if stale.name.isdigit():
                    shutil.rmtree(stale)
            try:
                return self._convert_once(row, folder / str(row["attempt"]))
            except ChildFailed as failure:
                if not failure.again or self.jobs.crashed(row) >= self.settings.job_attempts:
                    raise
                log.warning("a conversion crashed and is tried again", extra={"fields": {"error": failure.message}})

    def _convert_once(self, row: Row, folder: Path) -> dict[str, Any]:
        request = json.loads(row["request"])
        (folder / "output").mkdir(parents=True)
        self._lay_beside(request, folder)
        free = shutil.disk_usage(folder).free - self.settings.disk_reserve
        if free <= 0:
            raise ChildFailed("storage.full", "The disk of this service is full; nothing was kept of this job.")
        child = self.children.start(self._child_request(request, row, free))
        rate = ByteRate()

        def tick(done: int, total: int, stage: str) -> None:
            self.jobs.progress(row, done, total, stage, rate.update(done, stage))

        try:
            result = child.wait(tick)
        except ChildFailed as failure:
            fields = {"code": failure.code, "error": failure.message, "log": child.log_tail()}
            log.warning("a conversion failed", extra={"fields": fields})
            raise
        finally:
            child.close()
            self.children.prepare()
        return {**result, "attempt": row["attempt"]}

    @staticmethod
    def _lay_beside(request: Mapping[str, Any], folder: Path) -> None:
        """Put a previous compressed file into the folder of the file that builds on it.

        That is the new file that is being written, or the one that is read. Where the conversion writes, a stored file
        is only pointed at.
        """
        other = request.get("other")
        if other is None or other["folder"]:
            return
        name = clean_name(other["name"])
        if request["operation"] == "compress":
            os.symlink(folder.parent / "other" / name, folder / "output" / name)
        elif request["operation"] == "restore" and not (folder.parent / "input" / name).exists():
            os.link(folder.parent / "other" / name, folder.parent / "input" / name)

    def _child_request(self, request: Mapping[str, Any], row: Row, free: int) -> dict[str, Any]:
        def place(source: Mapping[str, Any] | None, folder: str) -> str | None:
            if source is None:
                return None
            return f"{folder}/{clean_name(source['name'])}"

        settings = self.settings
        return {
            "folder": str(self.folder(row["id"]) / str(row["attempt"])),
            "data": str(settings.data.resolve()),
            "operation": request["operation"],
            "source": place(request["source"], "input"),
            "other": place(request.get("other"), "other"),
            "output": f"{row['attempt']}/output",
            "name": clean_name(request["source"]["name"]),
            "display": request["source"]["name"],
            "options": request["options"],
            "threads": settings.job_threads,
            "memory": int(settings.job_memory),
            "seconds": settings.job_seconds,
            "file_size": free,
        }

    def publish(self, row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
        """Move what the conversion made into the store.

        It converts again when a crash or a move to another machine has left nothing to move.
        """
        folder = self.folder(row["id"]) / str(result["attempt"])
        prefix = f"results/{row['id']}/{result['attempt']}"
        keys = [f"{prefix}/{index}" for index in range(len(result["files"]))]
        moves = [(folder / "output" / file["name"], key) for file, key in zip(result["files"], keys, strict=True)]
        moves.append((folder / "report.json", f"{prefix}/report.json"))
        if not all(path.exists() or self.storage.exists(key) for path, key in moves):
            return self.publish(row, self.convert(row))
        for path, key in moves:
            self.jobs.progress(row, 0, 0, "storing", 0.0)
            if path.exists():
                self.storage.adopt(path, key)
        files = [{**file, "key": key} for file, key in zip(result["files"], keys, strict=True)]
        return {"files": files, "tar_sha256": result["tar_sha256"], "report": f"{prefix}/report.json"}

    def finish(self, row: Row, outcome: Mapping[str, Any]) -> None:
        """The visible end of a job, and the end of its folder. Raises Fenced when another attempt has the job."""
        result, error = outcome.get("ok"), outcome.get("error")
        if result is not None:
            nbytes = sum(file["bytes"] for file in result["files"])
            ended = self.jobs.end(row, "succeeded", result=dict(result), bytes_out=nbytes)
        else:
            ended = self.jobs.end(row, "cancelled" if error is None else "failed", error=error)
            if ended:
                self.storage.delete(f"results/{row['id']}")
        if not ended:
            raise Fenced(row["id"])
        self.clean(row["id"])

    def outcome_of(self, error: Exception) -> dict[str, Any]:
        """How a phase's failure is recorded: with a code and a sentence, or as the client's own wish."""
        if isinstance(error, Cancelled):
            return {"cancelled": True}
        if isinstance(error, ChildFailed):
            return {"error": error.document()}
        if isinstance(error, HTTPProblem):
            return {"error": {"code": error.code, "message": error.detail}}
        if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
            text = "The disk of this service is full; nothing was kept of this job."
            return {"error": {"code": "storage.full", "message": text}}
        if isinstance(error, OSError):
            log.error("a job failed on storage", exc_info=error)
            return {"error": {"code": "storage.failed", "message": "The storage of this service failed."}}
        log.error("a job failed in the service itself", exc_info=error)
        return {"error": {"code": "internal", "message": "The service failed; its operator can see why in the log."}}

    def clean(self, job: str) -> None:
        """Free the space of the job's folder."""
        shutil.rmtree(self.folder(job), ignore_errors=True)

    def clean_up(self) -> None:
        """At a worker's start: free the folders of jobs that have ended, which a crash may have left."""
        root = self.folder("x").parent
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.iterdir():
            job = self.database.one(sa.select(jobs.c.state).where(jobs.c.id == folder.name))
            if job is None or job["state"] in ENDED:
                self.clean(folder.name)
