"""A worker process: `python -m statecodec_server.worker INDEX`. It takes one job at a time.

Started by `statecodec serve` (which keeps stdin open; when that closes, the worker goes too) or on its own by
`statecodec worker`. SIGTERM: no further job, the one under way may finish within the drain time.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

from . import kernels, logs
from .database import Database
from .jobs import JobWorker
from .phases import JobPhases
from .settings import Settings
from .storage import Storage

log = logging.getLogger("statecodec.server.worker")


def _beat(work: JobPhases, settings: Settings, done: threading.Event) -> None:
    started = time.time()
    while True:
        try:
            work.jobs.beat(work.owner, os.getpid(), started)
        except Exception as error:  # the next beat may succeed; the lease decides
            log.warning("a heartbeat failed", extra={"fields": {"error": str(error)}})
        if done.wait(settings.lease_seconds / 5):
            return


def _follow_parent(done: threading.Event) -> None:
    while os.read(0, 64):
        pass
    log.warning("the supervisor is gone; this worker goes too")
    os._exit(0)


def run(settings: Settings, index: int, *, supervised: bool) -> None:
    """Work until told to stop."""
    logs.configure(settings.log_level)
    settings.data.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database, pool_size=3)
    work = JobPhases(settings, database, Storage(settings), f"{settings.worker_name}-{index}")
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    if supervised:
        threading.Thread(target=_follow_parent, args=(done,), daemon=True).start()
    kernels.prepare(settings)
    beating = threading.Event()
    work.jobs.beat(work.owner, os.getpid(), time.time())
    threading.Thread(target=_beat, args=(work, settings, beating), daemon=True).start()
    if index == 0:
        work.clean_up()
    work.children.prepare()
    worker = JobWorker(settings, work)
    worker.start()
    log.info("a worker is ready", extra={"fields": {"worker": work.owner}})
    done.wait()
    log.info("a worker drains", extra={"fields": {"worker": work.owner}})
    worker.stop()
    beating.set()
    logging.shutdown()
    os._exit(0)  # a conversion that outlived the drain time dies with us and is resumed elsewhere


if __name__ == "__main__":
    run(Settings(), int(sys.argv[1]), supervised=True)
