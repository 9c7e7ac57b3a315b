"""Every use of the job engine (DBOS): submit and cancel from the HTTP process, run and recover in the workers.

A job is one durable workflow whose id is the job's id. Its four phases are recorded as they finish, so a worker that
dies is continued in the phase it died in. Arguments and results are JSON (never the engine's default pickle), the
application version is ours and changes only when running jobs of an older service could not be continued.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, run_dbos_database_migrations
from sqlalchemy.exc import DBAPIError

from . import logs
from .phases import JobPhases
from .problems import HTTPProblem
from .records import Fenced, Row
from .settings import Settings

log = logging.getLogger("statecodec.server.jobs")
APPLICATION = "statecodec"
PLAN_VERSION = "1"
QUEUE = "conversions"
WORKFLOW = "convert"
RESTART_CODE = 75


def migrate(settings: Settings) -> None:
    """Create or update the engine's tables."""
    run_dbos_database_migrations(settings.jobs_database)


class JobQueue:
    """The HTTP process's side: it never runs a job. Every method blocks."""

    def __init__(self, settings: Settings) -> None:
        self._client = DBOSClient(
            system_database_url=settings.jobs_database,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            retry_connection_errors=False,
            system_database_pool_size=5,
        )

    def submit(self, job: str, token: str) -> None:
        """Put a job into the queue; doing so again changes nothing. Tokens take turns."""
        self._client.enqueue(
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": job,
                "queue_partition_key": token,
                "app_version": PLAN_VERSION,
            },
            job,
        )

    def cancel(self, job: str) -> None:
        """Take a job out of the queue that no worker has begun."""
        self._client.cancel_workflow(job)

    def forget(self, jobs: list[str]) -> None:
        """Remove what the engine remembers of ended jobs."""
        if jobs:
            self._client.delete_workflows(jobs)

    def recover(self, worker: str) -> list[str]:
        """Give the unfinished jobs of a dead worker back to the queue."""
        left = self._client.list_workflows(status="PENDING", executor_id=worker, name=WORKFLOW, load_input=False)
        workflows = [status.workflow_id for status in left]
        if workflows:
            self._client.resume_workflows(workflows, queue_name=QUEUE)
        return workflows

    def lost(self, job: str) -> bool:
        """Whether the engine has given a job up (or never had it) although its row is open."""
        workflows = self._client.list_workflows(workflow_ids=[job], load_input=False, load_output=False)
        return not workflows or workflows[0].status in (
            "ERROR",
            "MAX_RECOVERY_ATTEMPTS_EXCEEDED",
            "SUCCESS",
            "CANCELLED",
        )

    def ping(self) -> None:
        """Raise when the engine's database cannot be reached."""
        self._client.check_connection()

    def close(self) -> None:
        """Give the connections back."""
        self._client.destroy()


class JobWorker:
    """A worker process's side: takes one job at a time until told to stop."""

    def __init__(self, settings: Settings, work: JobPhases) -> None:
        self._settings = settings
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": settings.jobs_database,
                "serializer": DBOSPortableJSONSerializer(),
                "application_version": PLAN_VERSION,
                "executor_id": work.owner,
                "run_migrations": False,
                "log_level": "WARNING",
                "notification_listener_polling_interval_sec": settings.poll_seconds,
            }
        )
        _register(work)

    def start(self) -> None:
        """Begin to take jobs; unfinished ones of this worker's earlier life come first."""
        DBOS.launch()
        DBOS.register_queue(
            QUEUE,
            worker_concurrency=1,
            partition_worker_concurrency=1,
            polling_interval_sec=self._settings.poll_seconds,
            on_conflict="always_update",
        )

    def stop(self) -> None:
        """Take no further job and give the one under way the drain time; what is left then is resumed elsewhere."""
        DBOS.destroy(workflow_completion_timeout_sec=int(self._settings.drain_seconds))


def _register(work: JobPhases) -> None:
    claims: dict[str, Row] = {}

    def phase(name: str, function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
        def call(job: str, *arguments: Any) -> dict[str, Any]:
            return _outcome(work, function, claims[job], *arguments)

        return DBOS.step(name=name)(call)

    stage, convert = phase("stage", work.stage), phase("convert", work.convert)
    publish, finish = phase("publish", work.publish), phase("finish", work.finish)

    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def run(job: str) -> None:
        logs.job_id.set(job)
        try:
            row = claims[job] = work.jobs.claim(job, work.owner)
        except (Fenced, HTTPProblem):
            return  # cancelled, deleted, or ended by an attempt that died right after
        log.info("a job begins", extra={"fields": {"operation": row["operation"], "attempt": row["attempt"]}})
        outcome = stage(job)
        for following in (convert, publish):
            if "ok" in outcome:
                outcome = following(job, outcome["ok"])
        finish(job, outcome)
        fields = {"state": work.jobs.read(job)["state"], **{k: v for k, v in outcome.items() if k == "error"}}
        log.info("a job ended", extra={"fields": fields})
        del claims[job]


def _outcome(work: JobPhases, function: Callable[..., Any], row: Row, *arguments: Any) -> dict[str, Any]:
    """Run a phase; failures become values, because the engine would keep a raised error for ever.

    An overtaken worker, or one without its database, must leave no trace in the job it no longer owns: the process
    ends on the spot. Its supervisor starts it again, and what it still owns is resumed then.
    """
    try:
        return {"ok": function(row, *arguments)}
    except (Fenced, DBAPIError) as error:
        log.error("this worker lost its job or its database, and restarts", exc_info=error)
        logging.shutdown()
        os._exit(RESTART_CODE)
    except Exception as error:
        return work.outcome_of(error)
