"""The same jobs on Postgres, two workers, and one as on another machine; Debian's server, started here."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg
import pytest
from service import Service, free_port, put, submit, wait

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
PG = FOUND[-1].parent if FOUND else (Path(shutil.which("pg_ctl")).parent if shutil.which("pg_ctl") else None)
pytestmark = pytest.mark.skipif(PG is None, reason="no Postgres server is installed: apt-get install postgresql")
DATA = b"state " * 20_000


@pytest.fixture(scope="module")
def postgres():
    """A Postgres server of our own on a free port; its URL."""
    folder = Path(tempfile.mkdtemp(prefix="statecodec-pg-"))
    port = free_port()
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else None  # it refuses to run as root
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*command):
        as_user = {"user": user.pw_uid, "group": user.pw_gid} if user else {}
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)

    run(PG / "initdb", "-D", folder / "db", "-U", "statecodec", "--auth=trust", "--no-sync")
    flags = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(PG / "pg_ctl", "-D", folder / "db", "-o", flags, "-l", folder / "log", "-w", "start")
    run(PG / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "statecodec", "statecodec")
    yield f"postgresql://statecodec@127.0.0.1:{port}/statecodec"
    run(PG / "pg_ctl", "-D", folder / "db", "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shared(postgres, tmp_path_factory):
    """A service with two workers on it."""
    data = tmp_path_factory.mktemp("postgres") / "data"
    with Service(data, workers=2, database_url=postgres, lease_seconds=3) as running:
        yield running


def test_two_workers_share_the_queue_and_run_each_job_once(shared):
    with shared.client() as client:
        upload = put(client, b"BEHAVE slow 10\n" + DATA)
        other = shared.add_token("second")
        with shared.client(other) as second:
            theirs = put(second, b"BEHAVE slow 10\n" + DATA)
            began = [submit(client, "compress", upload)["id"] for _ in range(4)]
            also = [submit(second, "compress", theirs)["id"] for _ in range(4)]
            ended = [wait(client, job, 120) for job in began] + [wait(second, job, 120) for job in also]
    assert {job["state"] for job in ended} == {"succeeded"}
    assert {job["attempt"] for job in ended} == {1}
    assert len({job["files"][0]["sha256"] for job in ended}) == 1
    until = time.monotonic() + 10  # the worker says so after the job's end can be seen
    while (ends := shared.log().count('"a job ended"')) < 8 and time.monotonic() < until:
        time.sleep(0.1)
    assert ends == 8


def test_duplicates_make_one_job(shared):
    found = []
    with shared.client() as client:
        upload = put(client, DATA)

        def post():
            with shared.client() as mine:
                found.append(submit(mine, "compress", upload, key="storm")["id"])

        threads = [threading.Thread(target=post) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1
        assert wait(client, found[0])["attempt"] == 1


def test_a_killed_worker_changes_nothing(shared):
    with shared.client() as client:
        job = submit(client, "compress", put(client, b"BEHAVE slow 40\n" + DATA))
        until = time.monotonic() + 30
        while client.get(f"/v1/jobs/{job['id']}").json()["progress"]["done"] == 0 and time.monotonic() < until:
            time.sleep(0.05)
        workers = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(shared.process.pid)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for line in workers:
            if "statecodec_server.worker" in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)
        found = wait(client, job["id"], 90)
        assert (found["state"], found["attempt"]) == ("succeeded", 2)


def test_a_worker_elsewhere_takes_over_from_a_service_without_any(postgres, tmp_path):
    """`statecodec-server worker --db URL`: its own data folder, the shared database; objects are shared by a folder."""
    shared_objects = tmp_path / "objects"
    shared_objects.mkdir()
    with psycopg.connect(postgres, autocommit=True) as connection:  # apart: other tests' workers lack these objects
        connection.execute("CREATE DATABASE elsewhere")
    database = f"{postgres.rpartition('/')[0]}/elsewhere"
    settings = {"database_url": database, "storage_url": shared_objects.as_uri(), "lease_seconds": 3}
    service = Service(tmp_path / "front", workers=0, **settings)
    elsewhere = Service(tmp_path / "elsewhere", worker_name="elsewhere", **settings)
    service.token = "made below"  # the shared database has tokens, so this start prints none
    service.start(ready=False)
    process = None
    try:
        service.token = service.add_token("front")
        process = subprocess.Popen(
            [sys.executable, "-m", "statecodec_server", "worker"],
            env=elsewhere.environment(),
            stderr=subprocess.DEVNULL,
        )
        with service.client() as client:
            job = wait(client, submit(client, "compress", put(client, DATA))["id"], 90)
            assert job["state"] == "succeeded", job
            assert client.get(job["links"]["result"]).status_code == 200
    finally:
        if process is not None:
            process.terminate()
            assert process.wait(30) == 0
        service.stop()
