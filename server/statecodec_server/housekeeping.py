"""Regular tasks: expire uploads and results, free space, and give the jobs of dead workers to others."""

from __future__ import annotations

import asyncio
import logging
import time

import sqlalchemy as sa
from anyio.to_thread import run_sync

from .context import Context
from .database import jobs, uploads
from .records import ENDED

log = logging.getLogger("statecodec.server.housekeeping")
RESUBMIT_SECONDS = 15.0


def reap(here: Context) -> None:
    """Give lost jobs back to the queue: those of silent workers, and those whose submission was lost in a crash.

    Jobs that the queue has given up are ended.
    """
    for worker in here.jobs.silent():
        moved = here.queue.recover(worker)
        log.warning("a worker fell silent", extra={"fields": {"worker": worker, "jobs": moved}})
        here.jobs.forget_worker(worker)
    waiting = here.jobs.left_queued(RESUBMIT_SECONDS)
    for row in waiting:
        here.queue.submit(row["id"], row["token"])
    for row in [*waiting, *here.jobs.running()]:
        if here.queue.lost(row["id"]):
            error = {"code": "internal", "message": "The job was given up after repeated failures of the service."}
            here.jobs.end(row, "failed", error=error, any_attempt=True)


def sweep(here: Context) -> None:
    """Remove what has expired: files first, so that a crash leaves rows to find them by."""
    now = time.time()
    here.uploads.expire()
    expired = here.database.all(sa.select(jobs.c.id).where(jobs.c.expires < now, jobs.c.state.in_(ENDED)))
    for row in expired:
        here.storage.delete(f"results/{row['id']}")
        here.jobs.delete(row["id"])
    here.queue.forget([row["id"] for row in expired])
    _remove_orphans(here)


def _remove_orphans(here: Context) -> None:
    """Objects without a row: left by a crash between two writes."""
    for kind, table in (("uploads", uploads), ("results", jobs)):
        stored = here.storage.prefixes(kind)
        for start in range(0, len(stored), 500):
            batch = stored[start : start + 500]
            in_table = {row["id"] for row in here.database.all(sa.select(table.c.id).where(table.c.id.in_(batch)))}
            for identity in set(batch) - in_table:
                here.storage.delete(f"{kind}/{identity}")


async def run(here: Context) -> None:
    """Reap often and sweep sometimes, until it is cancelled. A failure is logged and the next round tries again."""
    next_sweep = 0.0
    while True:
        try:
            await run_sync(reap, here)
            if time.monotonic() >= next_sweep:
                await run_sync(sweep, here)
                next_sweep = time.monotonic() + here.settings.sweep_seconds
        except Exception as error:
            log.error("housekeeping failed; it will try again", exc_info=error)
        await asyncio.sleep(min(here.settings.lease_seconds / 4, here.settings.sweep_seconds))
