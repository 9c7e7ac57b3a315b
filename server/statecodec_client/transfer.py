"""The transfers behind client.py: requests that are repeated, uploads and downloads that are resumed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from statecodec.errors import CorruptFile, StatecodecError, UsageError

BLOCK = 1 << 20
CHUNK = 64 << 20
PATIENCE = 120.0
FIRST = 10.0  # seconds for the first answer: an address where nobody is will not get better
RETRY_STATUSES = frozenset({408, 423, 429, 500, 502, 503, 504})
TUS = {"Tus-Resumable": "1.0.0"}
OFFSET_TYPE = "application/offset+octet-stream"
Progress = Callable[[int, int, str], None]  # done bytes, total bytes, stage
Document = dict[str, Any]


class ServiceError(StatecodecError):
    """The service refused, failed, or could not be reached.

    Args:
        code: The service's own code, as docs/http.md lists them.
        message: A sentence for people.
        status: The HTTP status; 0 if there was no answer.
    """

    def __init__(self, code: str, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class Connection:
    """One service and one token.

    `patience` is the time in seconds without any progress after which a transfer gives up.
    """

    def __init__(self, url: str, token: str | None, patience: float, cache: Path) -> None:
        address = urllib.parse.urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UsageError(f"{url[:80]!r} is no address of a service; one is like http://localhost:8321")
        headers = {"User-Agent": "statecodec-client"} | ({"Authorization": f"Bearer {token}"} if token else {})
        timeout = httpx.Timeout(60.0, connect=10.0)
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
        self._url, self._patience, self._cache = url.rstrip("/"), patience, cache
        self._reached = False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, tried again while the service cannot be reached; raises ServiceError for a refusal."""
        waits = _Waits(self._patience if self._reached else min(self._patience, FIRST))
        while True:
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                waits.pause(error)
                continue
            if not self._reached:
                self._reached, waits = True, _Waits(self._patience)
            if answer.status_code in RETRY_STATUSES and waits.left():
                waits.pause(_refusal(answer), answer.headers.get("Retry-After"))
                continue
            if answer.status_code >= 400:
                raise _refusal(answer)
            return answer

    def upload(self, file: Path, progress: Progress) -> str:
        """Send a file, or the rest of it; the upload's id once both sides agree on its SHA-256."""
        size = file.stat().st_size
        note = self._note(file)
        location = self._resumable(note) or self._create(file, size, note)
        self._send(file, size, location, progress)
        identity = location.rsplit("/", 1)[-1]
        self._settled(identity, _sha256(file, lambda done: progress(done, size, "checking")))
        note.unlink(missing_ok=True)
        return identity

    def _note(self, file: Path) -> Path:
        stat = file.stat()
        text = f"{self._url}\n{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
        return self._cache / hashlib.sha256(text.encode()).hexdigest()

    def _resumable(self, note: Path) -> str | None:
        if not note.is_file():
            return None
        location = note.read_text().strip()
        try:
            self.request("HEAD", location, headers=TUS)
        except ServiceError:
            note.unlink(missing_ok=True)
            return None
        return location

    def _create(self, file: Path, size: int, note: Path) -> str:
        name = base64.b64encode(file.name.encode()).decode()
        headers = TUS | {"Upload-Length": str(size), "Upload-Metadata": f"filename {name}"}
        location = urllib.parse.urlsplit(self.request("POST", "/v1/uploads", headers=headers).headers["Location"]).path
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(location)
        return location

    def _send(self, file: Path, size: int, location: str, progress: Progress) -> None:
        waits = _Waits(self._patience)
        offset = int(self.request("HEAD", location, headers=TUS).headers["Upload-Offset"])
        progress(offset, size, "uploading")
        while offset < size:
            headers = TUS | {"Upload-Offset": str(offset), "Content-Type": OFFSET_TYPE}
            length = min(CHUNK, size - offset)
            body = _blocks(file, offset, length, lambda done: progress(done, size, "uploading"))
            try:
                headers["Content-Length"] = str(length)
                answer = self._http.patch(location, content=body, headers=headers)
                failure: Exception | None = None if answer.status_code == 204 else _refusal(answer)
            except httpx.TransportError as error:
                failure = error
            if isinstance(failure, ServiceError) and failure.status not in {409, *RETRY_STATUSES}:
                raise failure
            before = offset
            if failure is None:
                offset = int(answer.headers["Upload-Offset"])
            else:
                waits.pause(failure)
                offset = int(self.request("HEAD", location, headers=TUS).headers["Upload-Offset"])
            if offset > before:
                waits = _Waits(self._patience)

    def _settled(self, identity: str, sha256: str) -> None:
        """Wait until the service has stored the upload, and compare what it has with what we have."""
        while True:
            document: Document = self.request("GET", f"/v1/uploads/{identity}").json()
            if document["state"] == "ready":
                break
            if document["state"] != "finishing":
                raise ServiceError("upload.gone", f"the upload ended as {document['state']}")
            time.sleep(0.2)
        if document["sha256"] != sha256:
            raise CorruptFile(f"the service has SHA-256 {document['sha256']}, the file here {sha256}: upload it again")

    def fetch(self, file: Document, path: Path, seen: Callable[[int], None]) -> None:
        """Download one file of a result, or the rest of it, and give it its name once its SHA-256 is right.

        Args:
            file: the file as the job's document describes it.
            path: where it goes.
            seen: called with the bytes that are here so far.

        Raises:
            CorruptFile: there were other bytes, or more, than the service announced.
        """
        scratch = path.with_name(f".{path.name}.{file['sha256'][:16]}.part")
        waits, etag = _Waits(self._patience), f'"{file["sha256"]}"'
        have = scratch.stat().st_size if scratch.exists() else 0
        failure: Exception | None
        while have < file["bytes"]:
            before, failure = have, None
            headers = {"Range": f"bytes={have}-", "If-Range": etag, "Accept-Encoding": "identity"}
            try:
                with self._http.stream("GET", file["href"], headers=headers) as answer:
                    if answer.status_code not in (200, 206):
                        answer.read()
                        raise _refusal(answer)
                    with scratch.open("ab" if answer.status_code == 206 else "wb") as out:
                        have = out.tell()
                        for block in answer.iter_raw(BLOCK):
                            if have + len(block) > file["bytes"]:
                                raise CorruptFile(f"{path.name} goes on after the {file['bytes']} bytes it should have")
                            out.write(block)
                            have += len(block)
                            seen(have)
            except httpx.TransportError as error:
                failure = error
            if have == before:
                waits.pause(failure or ServiceError("http", "the service sends nothing of the result"))
            else:
                waits = _Waits(self._patience)
        scratch.touch()
        sha256 = _sha256(scratch)
        if sha256 != file["sha256"]:
            scratch.unlink()
            raise CorruptFile(f"{path.name} arrived with SHA-256 {sha256}, not {file['sha256']}: download it again")
        _publish(scratch, path)


class _Waits:
    """Growing pauses, until `patience` seconds have gone without progress."""

    def __init__(self, patience: float) -> None:
        self._until, self._next = time.monotonic() + patience, 0.1

    def left(self) -> bool:
        """Whether there is patience left."""
        return time.monotonic() < self._until

    def pause(self, reason: Exception, seconds: str | None = None) -> None:
        """Sleep a little; raises when patience has run out."""
        if not self.left():
            if isinstance(reason, ServiceError):
                raise reason
            raise ServiceError("unreachable", f"the service cannot be reached: {reason}") from reason
        asked = float(seconds) if seconds and seconds.isdigit() else 0.0
        time.sleep(min(max(self._next, asked), 30.0))
        self._next = min(self._next * 2, 5.0)


def _refusal(answer: httpx.Response) -> ServiceError:
    document: Document = {}
    with suppress(ValueError, httpx.ResponseNotRead):
        content = json.loads(answer.content)
        document = content if isinstance(content, dict) else {}
    text = document.get("detail") or f"the service answered {answer.status_code}"
    return ServiceError(str(document.get("code", "http")), str(text), answer.status_code)


def inside(name: str) -> Path:
    """A relative path that the service sent. Raises ServiceError for one that leads out of the target folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise ServiceError("usage", f"the service sent a file name that leads elsewhere: {name!r}")
    return path


def _blocks(file: Path, offset: int, length: int, seen: Callable[[int], None]) -> Iterator[bytes]:
    with file.open("rb") as source:
        source.seek(offset)
        while length:
            block = source.read(min(BLOCK, length))
            if not block:
                raise ServiceError("usage", f"{file} became shorter while it was uploaded")
            yield block
            offset, length = offset + len(block), length - len(block)
            seen(offset)


def _sha256(file: Path, seen: Callable[[int], None] | None = None) -> str:
    digest, done = hashlib.sha256(), 0
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            digest.update(block)
            done += len(block)
            if seen is not None:
                seen(done)
    return digest.hexdigest()


def _publish(scratch: Path, path: Path) -> None:
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(scratch, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
