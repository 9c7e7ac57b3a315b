"""The short version of the fault campaign (benchmarks/service_faults.py), and shutting down in order."""

import importlib.util
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest
from service import put, submit, wait

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "service_faults.py"


@pytest.fixture(scope="module")
def faults():
    """The campaign as a module."""
    spec = importlib.util.spec_from_file_location("service_faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["service_faults"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kill_9_inside_uploads_loses_nothing(faults, tmp_path):
    assert faults.upload_kills(tmp_path, 5, 6_000_000, seed=7) == 5


@pytest.mark.slow
def test_kill_9_of_a_worker_changes_no_result(faults, tmp_path):
    assert faults.worker_kills(tmp_path, ["after:convert"]) == 1


@pytest.mark.slow
def test_kill_9_of_the_service_changes_no_result_and_makes_no_second_job(faults, tmp_path):
    assert faults.duplicates(tmp_path, 10) == 10


@pytest.mark.slow
def test_a_full_or_read_only_disk(faults, tmp_path):
    if faults.full_disk(tmp_path) == 0:
        pytest.skip("this machine lets nobody mount a small disk")


def test_sigterm_saves_uploads_lets_the_job_finish_and_ends_with_0(fresh):
    service = fresh(drain_seconds=20)
    with service.client() as client:
        job = submit(client, "compress", put(client, b"BEHAVE slow 40\n" + b"x" * 1000))
        created = client.post("/v1/uploads", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "4000000"})
        path = created.headers["Location"].split(str(service.port))[1]

        def body():
            yield b"x" * 2_000_000
            time.sleep(30)
            yield b"x" * 2_000_000

        answers = []
        headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        sender = threading.Thread(target=lambda: answers.append(_patch(service, path, body(), headers)), daemon=True)
        sender.start()
        until = time.monotonic() + 20
        while client.get(f"/v1/jobs/{job['id']}").json()["state"] != "running" and time.monotonic() < until:
            time.sleep(0.05)
        spool = service.data / "spool" / path.rsplit("/", 1)[-1]
        while not (spool.exists() and spool.stat().st_size >= 1_000_000) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 0
    assert time.monotonic() - began < 29
    service.start()
    with service.client() as client:
        head = client.head(path, headers={"Tus-Resumable": "1.0.0"})
        assert int(head.headers["Upload-Offset"]) == 2_000_000
        found = wait(client, job["id"])
        assert (found["state"], found["attempt"]) == ("succeeded", 1)


def _patch(service, path, body, headers):
    with service.client() as client:
        try:
            return client.patch(path, content=body, headers=headers).status_code
        except OSError:
            return None
        except Exception as error:  # whatever the dying connection gives
            return type(error).__name__


def test_a_job_that_outlives_the_drain_goes_on_after_the_restart(fresh):
    service = fresh(drain_seconds=1)
    with service.client() as client:
        job = submit(client, "compress", put(client, b"BEHAVE slow 100\n" + b"x" * 1000))
        until = time.monotonic() + 20
        while client.get(f"/v1/jobs/{job['id']}").json()["progress"]["done"] == 0 and time.monotonic() < until:
            time.sleep(0.05)
    assert service.stop() == 0
    service.start()
    with service.client() as client:
        found = wait(client, job["id"])
        assert (found["state"], found["attempt"]) == ("succeeded", 2)


def test_jobs_that_the_queue_has_given_up_are_failed(fresh):
    """One that runs and one that is queued, however that came: nobody waits for ever."""
    service = fresh(lease_seconds=1)
    with service.client() as client:
        upload = put(client, b"BEHAVE slow 1000\n" + b"x" * 1000)
        running = submit(client, "compress", upload)["id"]
        until = time.monotonic() + 20
        while client.get(f"/v1/jobs/{running}").json()["progress"]["done"] == 0 and time.monotonic() < until:
            time.sleep(0.05)
        queued = submit(client, "compress", upload)["id"]
    service.kill()
    time.sleep(0.5)  # its worker notices
    with sqlite3.connect(service.data / "jobs.sqlite") as engine:
        engine.execute("UPDATE workflow_status SET status = 'ERROR'")
    with sqlite3.connect(service.data / "service.sqlite") as database:
        states = database.execute("SELECT id, state FROM service_jobs").fetchall()
        database.execute("UPDATE service_jobs SET created = created - 60 WHERE id = ?", (queued,))
    assert dict(states) == {running: "running", queued: "queued"}
    service.start()
    with service.client() as client:
        for job in (running, queued):
            found = wait(client, job)
            assert (found["state"], found["error"]["code"]) == ("failed", "internal")
