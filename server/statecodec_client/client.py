"""A client of the conversion service: resumable upload, jobs, verified download. Needs only httpx.

    with Client("https://checkpoints.lab.example", token="sct_...") as client:
        job = client.run("compress", "ckpt.pt", options={"preset": "resume"})
        client.download(job, "ckpt.sc.safetensors")

Every transfer survives lost connections and restarts of the server: uploads go on at the offset the server has on
disk, downloads at the byte that is missing, and both ends compare SHA-256. A submission that is repeated after a
lost answer finds its first job, because it carries an Idempotency-Key.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .transfer import PATIENCE, TUS, Connection, Document, Progress, ServiceError, inside

ENDED = frozenset({"succeeded", "failed", "cancelled"})


def _silent(done: int, total: int, stage: str) -> None:
    pass


class Client:
    """One service and one token. Close it, or use it as a context manager.

    Its methods raise ServiceError for a refusal of the service (with its `code` and HTTP status), and when it could not
    be reached for `patience` seconds; CorruptFile when the two ends have different bytes.

    Args:
        url: Where the service listens, such as `https://checkpoints.lab.example`.
        token: What `statecodec-server token add` printed; None for a service without tokens.
        patience: Seconds without any progress after which a transfer gives up.
        cache: The folder that remembers uploads that were begun; by default `statecodec/uploads` in the user's cache.
    """

    def __init__(
        self, url: str, token: str | None = None, *, patience: float = PATIENCE, cache: Path | None = None
    ) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._connection = Connection(url, token, patience, cache or home / "statecodec" / "uploads")
        self.request = self._connection.request

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    # Uploads

    def upload(self, path: str | os.PathLike[str], *, progress: Progress = _silent) -> str:
        """Upload a file; goes on where an earlier call that was interrupted left off.

        Args:
            path: The file.
            progress: Called with bytes done, bytes in total, and "uploading" or "checking".

        Returns:
            The upload's id, once both ends have the same SHA-256.

        Raises:
            CorruptFile: If the service received other bytes.
            ServiceError: If the service refused, or could not be reached.
        """
        return self._connection.upload(Path(path), progress)

    def upload_directory(self, path: str | os.PathLike[str], *, progress: Progress = _silent) -> list[Document]:
        """Upload every file of a directory checkpoint, without following links to folders.

        Args:
            path: The directory.
            progress: Called with bytes done, bytes in total of all files, and "uploading" or "checking".

        Returns:
            The `uploads` list of a job's source: for each file the upload's id, and its path with the folder's name.

        Raises:
            ServiceError: With the code `usage` if there is no file; else as `upload`.
            CorruptFile: If the service received other bytes.
        """
        root = Path(path)
        files = sorted(item for item in root.rglob("*") if item.is_file())
        if not files:
            raise ServiceError("usage", f"{root} has no files")
        total, sent, members = sum(item.stat().st_size for item in files), 0, []
        for item in files:
            identity = self.upload(item, progress=partial(_shift, progress, sent, total))
            sent += item.stat().st_size
            members.append({"upload": identity, "path": f"{root.resolve().name}/{item.relative_to(root).as_posix()}"})
        return members

    # Jobs

    def submit(
        self,
        operation: str,
        source: Mapping[str, Any],
        *,
        other: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Document:
        """Submit a job. Sent again after a lost answer, it makes no second job.

        Args:
            operation: `compress`, `restore` or another that `GET /v1/operations` lists.
            source: what to work on: `{"upload": id}`, `{"uploads": [...]}`, or another form of docs/http.md.
            other: the second checkpoint of an operation that takes two, in the same form.
            options: the operation's options, by name.
            key: the Idempotency-Key; by default a new one, so that each call is a job of its own.

        Returns:
            The job's document: `id`, `state`, `progress`, `links` and what else docs/http.md names.
        """
        body: Document = {"operation": operation, "source": dict(source), "options": dict(options or {})}
        if other is not None:
            body["other"] = dict(other)
        headers = {"Idempotency-Key": key or secrets.token_hex(16)}
        document: Document = self.request("POST", "/v1/jobs", json=body, headers=headers).json()
        return document

    def job(self, identity: str) -> Document:
        """Ask how a job is.

        Args:
            identity: The job's id.

        Returns:
            The job's document as it is now.

        Raises:
            ServiceError: If there is no such job.
        """
        document: Document = self.request("GET", f"/v1/jobs/{identity}").json()
        return document

    def wait(self, job: Document, *, progress: Progress = _silent, poll: float = 0.5) -> Document:
        """Wait until a job has ended.

        Args:
            job: a document of the job.
            progress: called with bytes done, bytes in total, and the name of the stage, after each answer.
            poll: seconds between two questions.

        Returns:
            The document of the job that succeeded.

        Raises:
            ServiceError: it failed (with its code), or was cancelled (`job.cancelled`).
        """
        while job["state"] not in ENDED:
            seen = job["progress"]
            progress(seen["done"], seen["total"], seen["stage"])
            time.sleep(poll)
            job = self.job(job["id"])
        if job["state"] == "succeeded":
            return job
        error = job["error"] or {"code": "job.cancelled", "message": "the job was cancelled"}
        raise ServiceError(error["code"], error["message"])

    def run(
        self,
        operation: str,
        path: str | os.PathLike[str],
        *,
        other: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
        progress: Progress = _silent,
    ) -> Document:
        """Upload a checkpoint, submit a job on it, and wait for its end.

        Args:
            operation: as in `submit`.
            path: a file, or a directory checkpoint.
            other: the second checkpoint of an operation that takes two.
            options: the operation's options, by name.
            progress: called with bytes done, bytes in total, and the name of the stage.

        Returns:
            The document of the job that succeeded.

        Raises:
            ServiceError: the service refused, or the job did not succeed.
            CorruptFile: the service received other bytes.
        """
        sources = [self.source(item, progress=progress) for item in (path, other) if item is not None]
        job = self.submit(operation, sources[0], other=[*sources, None][1], options=options)
        return self.wait(job, progress=progress)

    def source(self, path: str | os.PathLike[str], *, progress: Progress = _silent) -> Document:
        """Upload a file or a directory checkpoint.

        Args:
            path: The file or directory.
            progress: Called with bytes done, bytes in total, and the name of the stage.

        Returns:
            The `source` that `submit` takes.

        Raises:
            ServiceError: If the service refused, or could not be reached.
            CorruptFile: If the service received other bytes.
        """
        if Path(path).is_dir():
            return {"uploads": self.upload_directory(path, progress=progress)}
        return {"upload": self.upload(path, progress=progress)}

    def report(self, job: Document) -> Document:
        """Fetch the report of a job that succeeded.

        Args:
            job: The job's document.

        Returns:
            The JSON that `statecodec ... --json` prints.

        Raises:
            ServiceError: If there is none.
        """
        document: Document = self.request("GET", job["links"]["report"]).json()
        return document

    def cancel(self, job: Document) -> None:
        """Stop a job, at once or at its next report of progress. One that has ended stays as it is.

        Args:
            job: The job's document.

        Raises:
            ServiceError: If the service refused.
        """
        self.request("POST", f"/v1/jobs/{job['id']}/cancel")

    def delete(self, job: Document) -> None:
        """Remove an ended job and its result.

        Args:
            job: The job's document.

        Raises:
            ServiceError: If the job has not ended (it is cancelled then), or the service refused.
        """
        self.request("DELETE", f"/v1/jobs/{job['id']}")

    def forget(self, source: Mapping[str, Any]) -> None:
        """Remove the uploads behind a source.

        Args:
            source: What `source` gave.

        Raises:
            ServiceError: If the service refused.
        """
        for member in source.get("uploads", [source]):
            if "upload" in member:
                self.request("DELETE", f"/v1/uploads/{member['upload']}", headers=TUS)

    # Downloads

    def download(self, job: Document, target: str | os.PathLike[str], *, progress: Progress = _silent) -> list[Path]:
        """Fetch the result of a job that succeeded. A download that was interrupted goes on where it was.

        Args:
            job: the job's document.
            target: the path of a result of one file; else the folder that takes the files, or the result's one folder.
            progress: called with bytes done, bytes in total, and "downloading".

        Returns:
            The paths written. Each file had its SHA-256 before it got its name.

        Raises:
            CorruptFile: other bytes arrived than the service announced.
            ServiceError: the result is not there any more, or a file name leads out of `target`.
        """
        files = job["files"]
        total, done, written = sum(file["bytes"] for file in files), 0, []
        names = [inside(file["name"]) for file in files]
        is_folder = len({name.parts[0] for name in names}) == 1
        for file, name in zip(files, names, strict=True):
            path = Path(target) if len(files) == 1 else Path(target, *name.parts[is_folder:])
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection.fetch(file, path, partial(_seen, progress, done, total))
            done += file["bytes"]
            written.append(path)
        return written


def _shift(progress: Progress, base: int, whole: int, done: int, total: int, stage: str) -> None:
    progress(base + done, whole, stage)


def _seen(progress: Progress, base: int, total: int, done: int) -> None:
    progress(base + done, total, "downloading")
