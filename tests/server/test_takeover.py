"""Each thing that keeps the job table and the queue together, by the fault that it is there for (decision 12)."""

import os
import signal
import sqlite3
import subprocess
import time

from service import put, submit, wait

SLOW = b"BEHAVE slow 60\n" + b"x" * 1000


def until_begun(client, job):
    """Wait until a conversion of this job makes progress."""
    end = time.monotonic() + 60
    while client.get(f"/v1/jobs/{job['id']}").json()["progress"]["done"] == 0 and time.monotonic() < end:
        time.sleep(0.05)


def children(pid):
    """The processes that a process started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return list(map(int, found.stdout.split()))


def test_a_submission_that_was_lost_between_two_databases_is_made_again(fresh):
    """kill -9 between the row and the queue, as if."""
    service = fresh(ready=False, workers=0)
    with service.client() as client:
        job = submit(client, "compress", put(client, b"x" * 1000))
    service.stop()
    with sqlite3.connect(service.data / "jobs.sqlite") as engine:
        assert engine.execute("DELETE FROM workflow_status WHERE workflow_uuid = ?", (job["id"],)).rowcount == 1
    with sqlite3.connect(service.data / "service.sqlite") as database:
        database.execute("UPDATE service_jobs SET created = created - 60 WHERE id = ?", (job["id"],))
    service.settings["workers"] = 1
    service.start()
    with service.client() as client:
        assert wait(client, job["id"])["state"] == "succeeded"


def test_the_jobs_of_a_worker_that_never_comes_back_are_done_by_another(fresh):
    service = fresh(worker_name="first", lease_seconds=1)
    with service.client() as client:
        job = submit(client, "compress", put(client, SLOW))
        until_begun(client, job)
    service.kill()
    service.settings["worker_name"] = "second"
    service.start()
    with service.client() as client:
        found = wait(client, job["id"])
        assert (found["state"], found["attempt"]) == ("succeeded", 2)


def test_a_worker_that_was_taken_for_dead_leaves_no_trace_in_the_job(fresh):
    """It sleeps while another one does its job, wakes up in the middle of it, and finds that it no longer owns it."""
    service = fresh(workers=2, lease_seconds=1)
    with service.client() as client:
        job = submit(client, "compress", put(client, SLOW))
        until_begun(client, job)
        with sqlite3.connect(service.data / "service.sqlite") as database:
            (asleep,) = database.execute(
                "SELECT w.pid FROM service_jobs j JOIN service_workers w ON w.id = j.owner WHERE j.id = ?", (job["id"],)
            ).fetchone()
        stopped = [asleep, *children(asleep)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        found = wait(client, job["id"])
        assert (found["state"], found["attempt"]) == ("succeeded", 2)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + 60
        while "this worker lost its job" not in service.log() and time.monotonic() < end:
            time.sleep(0.05)
        assert "this worker lost its job" in service.log()
        assert client.get(f"/v1/jobs/{job['id']}").json() == found
        ended = [line for line in client.get("/metrics").text.splitlines() if line.startswith("statecodec_jobs_ended")]
        assert [float(line.split()[-1]) for line in ended] == [1.0]
