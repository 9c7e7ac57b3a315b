"""The worker's side of a conversion: start the child, watch it, and turn every way it can end into an answer."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import kernels
from .settings import Settings

log = logging.getLogger("statecodec.server.jobs")
_STDERR_KEPT = 8192


class ChildFailed(Exception):
    """The conversion did not produce a result; `again` when trying once more could help."""

    def __init__(self, code: str, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.code, self.message, self.again = code, message, again

    def document(self) -> dict[str, str]:
        """What the job shows as its error."""
        return {"code": self.code, "message": self.message}


class ByteRate:
    """Bytes per second, smoothed over a few seconds; restarts with each stage."""

    def __init__(self) -> None:
        self._stage, self._done, self._at, self.value = "", 0, time.monotonic(), 0.0

    def update(self, done: int, stage: str) -> float:
        """The rate after hearing that `done` bytes of `stage` are finished."""
        now = time.monotonic()
        if stage != self._stage or done < self._done:
            self._stage, self._done, self._at, self.value = stage, done, now, 0.0
        elif now - self._at >= 0.2:
            fresh = (done - self._done) / (now - self._at)
            self.value = fresh if self.value == 0.0 else 0.7 * self.value + 0.3 * fresh
            self._done, self._at = done, now
        return self.value


def _resident(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/statm").read_text()
    except OSError:
        return 0
    return (int(text.split()[1]) - int(text.split()[2])) * os.sysconf("SC_PAGE_SIZE")


class Children:
    """Starts children; keeps one ready, which has imported the library while there was nothing else to do."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._environment = kernels.child_environment(settings, kernels.folder(settings))
        self._spare: subprocess.Popen[bytes] | None = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "statecodec_server.child", self._settings.backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )

    def prepare(self) -> None:
        """Have a child ready for the next job."""
        if self._spare is None:
            self._spare = self._spawn()

    def start(self, request: dict[str, Any]) -> Child:
        """A child at work on this request."""
        process, self._spare = self._spare, None
        if process is not None and process.poll() is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            process = None
        return Child(self._settings, self._spawn() if process is None else process, request)


class Child:
    """One running conversion."""

    def __init__(self, settings: Settings, process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
        self._settings, self._deadline = settings, time.monotonic() + settings.job_seconds
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = process
        folder = Path(request["folder"])
        (folder / "tmp").mkdir(exist_ok=True)
        self._log = folder / "log"
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; wait() says how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # half a line: it died while writing
            for line in self._process.stdout:
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def wait(self, tick: Callable[[int, int, str], None]) -> dict[str, Any]:
        """The result. `tick` runs every poll interval with the progress; what it raises ends the child.

        Raises ChildFailed, with the code of the library's error or of a crash.
        """
        done, total, stage = 0, 0, "starting"
        next_tick = time.monotonic()
        while True:
            if time.monotonic() >= next_tick:
                tick(done, total, stage)
                self._check_limits()
                next_tick = time.monotonic() + self._settings.poll_seconds
            try:
                message = self._messages.get(timeout=max(0.01, next_tick - time.monotonic()))
            except queue.Empty:
                continue
            if message is None:
                raise self._crash()
            if "progress" in message:
                done, total, stage = message["progress"]
            elif "walls" in message:
                log.info("a conversion begins", extra={"fields": {"walls": message["walls"]}})
            elif "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            elif "error" in message:
                error = message["error"]
                raise ChildFailed(error["code"], error["message"])

    def _check_limits(self) -> None:
        if time.monotonic() > self._deadline:
            raise ChildFailed("job.timeout", f"The conversion took longer than {self._settings.job_seconds:g} seconds.")
        if _resident(self._process.pid) > self._settings.job_memory:
            raise ChildFailed("job.memory", "The conversion needed more memory than it may have.")

    def _crash(self) -> ChildFailed:
        code = self._process.wait(timeout=30)
        if code == -signal.SIGXCPU:
            return ChildFailed("job.timeout", "The conversion used up its processor time.")
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ChildFailed("job.crashed", f"The conversion process ended with {ending}.", again=True)

    def log_tail(self) -> str:
        """The end of what the child wrote to stderr, for the service's own log."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _STDERR_KEPT))
            return file.read().decode(errors="replace")

    def close(self) -> None:
        """Make sure that nothing of the child is left."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
