"""Job rows: created once per Idempotency-Key, claimed by one attempt at a time, ended exactly once.

Every write of a worker names its attempt. A worker that was taken for dead and comes back finds another attempt in
the row, and its writes touch nothing: that is the fence that makes the visible end unique.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from .database import Database, add, jobs, workers
from .problems import HTTPProblem, not_found
from .settings import Settings
from .tokens import Principal

Row = Mapping[str, Any]
ENDED = ("succeeded", "failed", "cancelled")
DURATION_BUCKETS = (0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200)
RATIO_BUCKETS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 8)


class Fenced(Exception):
    """This attempt is not the job's current one any more, or the job has ended: stop, and touch nothing."""


class Cancelled(Exception):
    """The client does not want this job any longer."""


class Jobs:
    """Reads and writes of the job table, shared by the HTTP process and the workers."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database

    def create(
        self, principal: Principal, request: dict[str, Any], fingerprint: str, key: str | None, bytes_in: int
    ) -> tuple[Row, bool]:
        """The job for this request, and whether it is a new one; raises 422 when the key belongs to another."""
        now = time.time()
        row = {
            "id": secrets.token_hex(13),
            "token": principal.id,
            "operation": request["operation"],
            "request": json.dumps(request),
            "fingerprint": fingerprint,
            "idempotency_key": key,
            "state": "queued",
            "created": now,
            "expires": now + self._settings.keep_ttl,
            "bytes_in": bytes_in,
        }
        with self._database.write() as connection:
            if key is not None:
                same = sa.select(jobs).where(jobs.c.token == principal.id, jobs.c.idempotency_key == key)
                if (earlier := connection.execute(same).mappings().first()) is not None:
                    return _same_request(dict(earlier), fingerprint), False
            open_jobs = sa.select(sa.func.count()).where(jobs.c.token == principal.id, jobs.c.state.notin_(ENDED))
            if connection.execute(open_jobs).scalar_one() >= self._settings.max_jobs:
                raise HTTPProblem(
                    429,
                    "job.limit",
                    f"One token has at most {self._settings.max_jobs} unfinished jobs.",
                    headers={"Retry-After": "10"},
                )
            try:
                with connection.begin_nested():
                    connection.execute(jobs.insert().values(row))
            except sa.exc.IntegrityError:  # Postgres: the same key was inserted by another connection just now
                same = sa.select(jobs).where(jobs.c.token == principal.id, jobs.c.idempotency_key == key)
                return _same_request(dict(connection.execute(same).mappings().one()), fingerprint), False
            add(connection, "jobs_submitted", request["operation"], 1)
        return self.read(row["id"]), True

    def find(self, principal: Principal, key: str, fingerprint: str) -> Row | None:
        """The job this token made with this Idempotency-Key; raises 422 when it was for another request."""
        same = sa.select(jobs).where(jobs.c.token == principal.id, jobs.c.idempotency_key == key)
        row = self._database.one(same)
        return None if row is None else _same_request(row, fingerprint)

    def read(self, job: str) -> Row:
        """A job, of any owner; raises 404."""
        row = self._database.one(sa.select(jobs).where(jobs.c.id == job))
        if row is None:
            raise not_found("job")
        return row

    def get(self, principal: Principal, job: str) -> Row:
        """A job of this token; raises 404."""
        row = self._database.one(sa.select(jobs).where(jobs.c.id == job, jobs.c.token == principal.id))
        if row is None:
            raise not_found("job")
        return row

    def newest(self, principal: Principal) -> list[Row]:
        """The newest jobs of this token."""
        query = sa.select(jobs).where(jobs.c.token == principal.id).order_by(jobs.c.created.desc())
        return self._database.all(query.limit(200))

    def claim(self, job: str, owner: str) -> Row:
        """Begin the next attempt; raises Fenced when there is nothing left to do."""
        statement = (
            jobs.update()
            .where(jobs.c.id == job, jobs.c.state.in_(("queued", "running")))
            .values(
                state="running",
                owner=owner,
                attempt=jobs.c.attempt + 1,
                stage="starting",
                done=0,
                rate=0.0,
                started=sa.func.coalesce(jobs.c.started, time.time()),
            )
        )
        if not self._database.execute(statement):
            raise Fenced(job)
        return self.read(job)

    def progress(self, row: Row, done: int, total: int, stage: str, rate: float) -> None:
        """Report where the attempt is; raises Cancelled or Fenced when it should not go on."""
        still_ours = sa.and_(jobs.c.id == row["id"], jobs.c.attempt == row["attempt"], jobs.c.state == "running")
        with self._database.write() as connection:
            values = {"done": done, "total": total, "stage": stage, "rate": rate}
            if not connection.execute(jobs.update().where(still_ours).values(values)).rowcount:
                raise Fenced(row["id"])
            cancel = connection.execute(sa.select(jobs.c.cancel).where(jobs.c.id == row["id"])).scalar_one()
        if cancel:
            raise Cancelled(row["id"])

    def crashed(self, row: Row) -> int:
        """Count a crash of this job's child process; returns how many there were."""
        where = jobs.c.id == row["id"]
        self._database.execute(jobs.update().where(where).values(crashes=jobs.c.crashes + 1))
        return int(self.read(row["id"])["crashes"])

    def end(
        self,
        row: Row,
        state: str,
        *,
        error: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
        bytes_out: int = 0,
        any_attempt: bool = False,
    ) -> bool:
        """The visible end of a job, written once; False when it had ended or another attempt has it."""
        now = time.time()
        where = sa.and_(jobs.c.id == row["id"], jobs.c.state.notin_(ENDED))
        if not any_attempt:
            where = sa.and_(where, jobs.c.attempt == row["attempt"])
        values = {
            "state": state, "finished": now, "expires": now + self._settings.keep_ttl, "stage": state, "owner": None,
            "error": None if error is None else json.dumps(error), "bytes_out": bytes_out,
            "result": None if result is None else json.dumps(result),
        }  # fmt: skip
        with self._database.write() as connection:
            if not connection.execute(jobs.update().where(where).values(values)).rowcount:
                return False
            _count_end(connection, row, state, now, bytes_out)
        return True

    def ask_cancel(self, job: str) -> str:
        """Cancel at once what no worker has begun, ask the worker otherwise; returns the state afterwards."""
        with self._database.write() as connection:
            where = sa.and_(jobs.c.id == job, jobs.c.state.in_(("queued", "running")))
            connection.execute(jobs.update().where(where).values(cancel=True))
        row = self.read(job)
        if row["state"] == "queued":
            self.end(row, "cancelled")
        return str(self.read(job)["state"])

    def beat(self, worker: str, pid: int, started: float) -> None:
        """Note that a worker is alive."""
        values = {"pid": pid, "started": started, "seen": time.time()}
        if not self._database.execute(workers.update().where(workers.c.id == worker).values(values)):
            self._database.execute(workers.insert().values(id=worker, **values))

    def alive(self) -> list[str]:
        """Workers heard of within the lease."""
        since = time.time() - self._settings.lease_seconds
        return [row["id"] for row in self._database.all(sa.select(workers.c.id).where(workers.c.seen >= since))]

    def silent(self) -> list[str]:
        """Workers that have not been heard of within the lease."""
        since = time.time() - self._settings.lease_seconds
        return [row["id"] for row in self._database.all(sa.select(workers.c.id).where(workers.c.seen < since))]

    def forget_worker(self, worker: str) -> None:
        """Remove a dead worker whose jobs have moved to others."""
        since = time.time() - self._settings.lease_seconds
        self._database.execute(workers.delete().where(workers.c.id == worker, workers.c.seen < since))

    def left_queued(self, older_than: float) -> list[Row]:
        """Rows whose submission to the queue may have been lost in a crash."""
        before = time.time() - older_than
        return self._database.all(sa.select(jobs).where(jobs.c.state == "queued", jobs.c.created < before))

    def running(self) -> list[Row]:
        """Rows of jobs that a worker has begun and not ended."""
        return self._database.all(sa.select(jobs).where(jobs.c.state == "running"))

    def delete(self, job: str) -> None:
        """Remove the row of an ended job; its bytes stop counting."""
        self._database.execute(jobs.delete().where(jobs.c.id == job))


def _same_request(row: Row, fingerprint: str) -> Row:
    if row["fingerprint"] != fingerprint:
        raise HTTPProblem(422, "job.key_reused", "This Idempotency-Key was used for another request.")
    return row


def _count_end(connection: sa.Connection, row: Row, state: str, now: float, bytes_out: int) -> None:
    operation = row["operation"]
    add(connection, "jobs_ended", f"{operation} {state}", 1)
    if state != "succeeded":
        return
    seconds = now - (row["started"] or now)
    add(connection, "job_seconds_sum", operation, seconds)
    add(connection, "job_bytes_in", operation, row["bytes_in"])
    add(connection, "job_bytes_out", operation, bytes_out)
    edge = next((str(edge) for edge in DURATION_BUCKETS if seconds <= edge), "+Inf")
    add(connection, "job_seconds", f"{operation} {edge}", 1)
    if operation == "compress" and bytes_out:
        ratio = row["bytes_in"] / bytes_out
        add(connection, "job_ratio", next((str(edge) for edge in RATIO_BUCKETS if ratio <= edge), "+Inf"), 1)
        add(connection, "job_ratio_sum", "", ratio)
