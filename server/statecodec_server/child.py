"""The process that does one conversion: `python -m statecodec_server.child BACKEND`, a JSON request on stdin.

It imports the library first, so that a worker can keep one ready, and serves one request only. It answers in JSON
lines on its original stdout: {"progress": [done, total, stage]} now and then, and at the end {"result": ...} or
{"error": {...}}. stdin stays open: when it closes, the worker is gone and so is this process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from . import sandbox
from .problems import FULL_ERRNOS

PROGRESS_SECONDS = 0.1
_PLACES = re.compile(r"\b(?:input|other|[0-9]+/output)/")  # of the job's folder: the client knows names only


class Channel:
    """The line back to the worker; print() and warnings of the library go to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self._last = 0.0

    def send(self, **message: Any) -> None:
        """One line."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def progress(self, done: int, total: int, stage: str) -> None:
        """The library's progress callback, thinned out."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS or done == total:
            self._last = now
            self.send(progress=[int(done), int(total), str(stage)[:60]])


def _follow_parent() -> None:
    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(70)

    threading.Thread(target=watch, daemon=True).start()


def _read_request() -> dict[str, Any]:
    data = bytearray()
    while not data.endswith(b"\n"):
        block = os.read(0, 1 << 16)
        if not block:
            os._exit(70)
        data += block
    request: dict[str, Any] = json.loads(data)
    return request


def _describe(error: Exception) -> dict[str, Any]:
    code = getattr(error, "code", None)
    text = re.sub(_PLACES, "", str(error).replace(os.getcwd() + os.sep, ""))
    if isinstance(code, str):
        return {"code": code, "message": text}
    if isinstance(error, MemoryError):
        return {"code": "job.memory", "message": "The conversion needed more memory than it may have."}
    if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
        return {"code": "storage.full", "message": "The disk of this service is full; nothing was kept of this job."}
    if "can't allocate memory" in text or "DefaultCPUAllocator" in text:
        return {"code": "job.memory", "message": "The conversion needed more memory than it may have."}
    kind = type(error).__name__
    return {"code": "internal", "message": f"The conversion failed in a way it should not: {kind}: {text}"}


def _files(folder: Path) -> list[tuple[str, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)


def _report(value: Any, staged: str, display: str) -> dict[str, Any]:
    """The report as the client may see it, without any path of this machine.

    Names are those that the client gave, or that the file itself has.
    """
    document = value.to_json() if hasattr(value, "to_json") else value
    if not isinstance(document, dict):
        raise TypeError(f"an operation returned {type(value).__name__}, not a report")
    source = document.get("source")
    if isinstance(source, dict):
        name = Path(str(source.get("name") or staged)).name
        document["source"] = {**source, "name": display if name == staged else name}
    for key in ("path", "a", "b", "files", "sources"):
        if isinstance(value := document.get(key), str):
            document[key] = Path(value).name
        elif isinstance(value, list):
            document[key] = [Path(str(item)).name for item in value]
    return document


def _work(request: Mapping[str, Any], channel: Channel) -> dict[str, Any]:
    from statecodec.operations import OPERATIONS

    from .operations import OperationCall, run
    from .segments import tar_sha256

    operation = OPERATIONS[request["operation"]]
    library = import_module(sys.argv[1])
    output = Path(request["output"])
    sandbox.lock_down([output.parent])
    other = request.get("other")
    call = OperationCall(
        source=Path(request["source"]),
        other=None if other is None else Path(other),
        output=output,
        name=request["name"],
        options=request["options"],
        threads=request["threads"],
        progress=channel.progress,
    )
    report = _report(run(library, operation, call), request["name"], request["display"])
    channel.send(progress=[0, 0, "checking"])
    files = _files(output)
    sha256, each = tar_sha256(output, files) if operation.makes_files else ("", [])
    (output.parent / "report.json").write_text(json.dumps(report))
    return {
        "files": [
            {"name": name, "bytes": nbytes, "sha256": digest}
            for (name, nbytes), digest in zip(files, each, strict=True)
        ],
        "tar_sha256": sha256,
    }


def _warm_up(backend: str) -> None:
    """Import what takes seconds before the request is there."""
    library = import_module(backend)
    for name in library.__all__:
        getattr(library, name)


def _settle_in(request: Mapping[str, Any]) -> None:
    """Change to the job's folder, and send output and temporary files there."""
    folder = Path(request["folder"])
    os.chdir(folder.parent)
    os.environ["HOME"] = os.environ["TMPDIR"] = str(folder / "tmp")
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def main() -> None:
    """Do what stdin says, once."""
    walls = sandbox.detach()
    channel = Channel()
    _warm_up(sys.argv[1])
    request = _read_request()
    _settle_in(request)
    sandbox.limit(request["memory"], request["seconds"], request["file_size"], request["threads"])
    walls += sandbox.confine(Path(request["folder"]), Path(request["data"]))  # before any thread
    _follow_parent()
    channel.send(walls=walls)
    try:
        result = _work(request, channel)
    except Exception as error:  # every failure becomes a message; the worker decides what to do about it
        import traceback

        traceback.print_exc()
        channel.send(error=_describe(error))
        sys.exit(1)
    channel.send(result=result)


if __name__ == "__main__":
    main()
