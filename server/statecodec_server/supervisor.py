"""Keeps the worker processes of this machine alive, each under a name of its own that survives restarts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from .settings import Settings

log = logging.getLogger("statecodec.server.supervisor")
WORKER = "statecodec_server.worker"
_CHECK_SECONDS = 0.25
_LONG_LIFE = 60.0  # a worker that lived so long is restarted without delay
_BACK_OFF = (0.2, 1.0, 3.0, 10.0)


def environment(settings: Settings) -> dict[str, str]:
    """The environment that makes another process read the same settings."""
    variables = dict(os.environ)
    for name, value in settings.model_dump(mode="json", exclude_none=True).items():
        if name == "database_url":
            assert settings.database_url is not None
            value = settings.database_url.get_secret_value()
        variables[f"STATECODEC_SERVER_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
    return variables


class Supervisor:
    """Starts `settings.workers` processes and starts again each that ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._failures = dict.fromkeys(range(settings.workers), 0)
        self._started: dict[int, float] = {}
        self._stopping = False

    def _start(self, index: int) -> None:
        self._started[index] = time.monotonic()
        self._processes[index] = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment(self._settings),
            start_new_session=True,  # ctrl-C reaches us alone; we pass it on in order
        )

    async def run(self) -> None:
        """Until stop(): see that every worker lives."""
        for index in range(self._settings.workers):
            self._start(index)
        due: dict[int, float] = {}
        while not self._stopping:
            await asyncio.sleep(_CHECK_SECONDS)
            for index, process in list(self._processes.items()):
                if process.poll() is None or self._stopping:
                    continue
                if index not in due:
                    if time.monotonic() - self._started[index] > _LONG_LIFE:
                        self._failures[index] = 0
                    wait = _BACK_OFF[min(self._failures[index], len(_BACK_OFF) - 1)]
                    self._failures[index] += 1
                    due[index] = time.monotonic() + wait
                    log.error("a worker ended", extra={"fields": {"worker": index, "code": process.returncode}})
                elif due[index] <= time.monotonic():
                    del due[index]
                    self._close_pipe(process)
                    self._start(index)

    @staticmethod
    def _close_pipe(process: subprocess.Popen[bytes]) -> None:
        with suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()

    def alive(self) -> int:
        """How many worker processes run."""
        return sum(process.poll() is None for process in self._processes.values())

    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._processes.values() if process.poll() is None]

    async def stop(self) -> None:
        """Let every worker drain; kill what has not ended after the drain time."""
        self._stopping = True
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._settings.drain_seconds + 10
        while self.alive() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
            self._close_pipe(process)
