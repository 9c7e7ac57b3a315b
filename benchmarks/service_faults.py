"""Kill the service in every way it can be killed, let it go on, and compare with an undisturbed run.

    python benchmarks/service_faults.py                     the campaign (`make faults`), some fifteen minutes
    python benchmarks/service_faults.py --short             what the test suite runs
    python benchmarks/service_faults.py --write             also rewrite the table in docs/service.md

Everything runs on this machine over loopback, with the real server and worker processes and, for the conversions, a
small deterministic stand-in for the library (tests/server/double.py), so that what is tested is the service.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "server")]
from service import Service, put, submit, wait  # noqa: E402
from service_upload_kills import TUS, Wrong, require, upload_kills  # noqa: E402

PHASES = ("stage", "convert", "publish", "finish")
RESULTS = ROOT / "benchmarks" / "results" / "service_faults.json"
DOCUMENT = ROOT / "docs" / "service.md"
MARKS = ("<!-- faults: begin -->", "<!-- faults: end -->")


@dataclass(frozen=True)
class Fault:
    """One row of the table: what was done, how often, and in how many cases the outcome was right."""

    fault: str
    expected: str
    times: int
    right: int
    seconds: float


def _undisturbed(folder: Path, data: bytes) -> list[str]:
    with Service(folder / "undisturbed") as service, service.client() as client:
        job = wait(client, submit(client, "compress", put(client, data))["id"])
        return [file["sha256"] for file in job["files"]]


def _expect_same(job: dict[str, object], expected: list[str]) -> None:
    require(job["state"] == "succeeded", f"the job ended as {job['state']}: {job['error']}")
    files = job["files"]
    assert isinstance(files, list)
    require([file["sha256"] for file in files] == expected, "the result differs from an undisturbed run")


def worker_kills(folder: Path, places: list[str]) -> int:
    """kill -9 of the worker at each place; the supervisor starts it again and the job goes on."""
    data = b"BEHAVE slow 15\n" + bytes(range(256)) * 4000
    expected = _undisturbed(folder, data)
    for index, place in enumerate(places):
        os.environ["KILL_AT"] = place
        try:
            with Service(folder / f"kill{index}", module="faulty_server") as service, service.client() as client:
                job = wait(client, submit(client, "compress", put(client, data))["id"])
                _expect_same(job, expected)
                require(client.get(job["links"]["result"]).status_code == 200, "the result cannot be fetched")
                require((service.data / f"died-{place.replace(':', '-')}").exists(), f"nothing died at {place}")
                _no_rubbish(service, job["id"])
        finally:
            del os.environ["KILL_AT"]
    return len(places)


def _no_rubbish(service: Service, job: object) -> None:
    until = time.monotonic() + 10
    while (service.data / "work" / str(job)).exists() and time.monotonic() < until:
        time.sleep(0.05)
    require(not (service.data / "work" / str(job)).exists(), "the job's folder is still there")


def service_kills(folder: Path, kills: int, seed: int) -> int:
    """kill -9 of the whole service at random moments of a job; after each restart the job goes on."""
    rng = random.Random(seed)
    data = b"BEHAVE slow 10\n" + bytes(range(256)) * 4000
    expected = _undisturbed(folder / "service", data)
    service = Service(folder / "killed").start()
    done = 0
    while done < kills:
        with service.client() as client:
            job = submit(client, "compress", put(client, data))
        for _ in range(2):
            if done < kills:
                time.sleep(rng.uniform(0.0, 1.2))
                service.kill()
                done += 1
                service.start()
        with service.client() as client:
            _expect_same(wait(client, job["id"]), expected)
    service.stop()
    return done


def silent_worker(folder: Path) -> int:
    """A worker that stops (SIGSTOP) is taken for dead: its job moves on and ends once, and it comes back in vain."""
    data = b"BEHAVE slow 30\n" + bytes(range(256)) * 1000
    expected = _undisturbed(folder / "silent", data)
    with Service(folder / "stopped", workers=2, lease_seconds=2) as service, service.client() as client:
        job = submit(client, "compress", put(client, data))
        victim = _worker_at_work(service, client, job["id"])
        os.kill(victim, signal.SIGSTOP)
        try:
            _expect_same(wait(client, job["id"], 90), expected)
        finally:
            os.kill(victim, signal.SIGCONT)
        time.sleep(2)
        _expect_same(client.get(f"/v1/jobs/{job['id']}").json(), expected)
        ends = [line for line in service.log().splitlines() if '"a job ended"' in line]
        require(len(ends) == 1, f"the job ended {len(ends)} times")
    return 1


def _worker_at_work(service: Service, client: httpx.Client, job: str) -> int:
    import sqlite3

    until = time.monotonic() + 30
    while time.monotonic() < until:
        connection = sqlite3.connect(service.data / "service.sqlite")
        query = (
            "SELECT w.pid FROM service_jobs j JOIN service_workers w ON w.id = j.owner WHERE j.id = ? AND j.stage = ?"
        )
        row = connection.execute(query, (job, "encoding")).fetchone()
        connection.close()
        if row:
            return int(row[0])
        time.sleep(0.05)
    raise Wrong("no worker took the job")


def duplicates(folder: Path, times: int) -> int:
    """Many simultaneous submissions with one Idempotency-Key, across a kill -9: one job."""
    service = Service(folder / "duplicates").start()
    with service.client() as client:
        upload = put(client, b"x" * 100_000)
    found: list[str] = []

    def post() -> None:
        with service.client() as mine:
            try:
                found.append(submit(mine, "compress", upload, key="one")["id"])
            except httpx.TransportError:
                return  # killed in the middle: tried again below

    for _ in range(2):
        threads = [threading.Thread(target=post) for _ in range(times // 2)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        service.kill()
        for thread in threads:
            thread.join()
        service.start()
        post()
    with service.client() as client:
        require(len(set(found)) == 1, f"{len(set(found))} jobs came of one key")
        require(len(client.get("/v1/jobs").json()) == 1, "there is more than one job")
        require(wait(client, found[0])["state"] == "succeeded", "the one job failed")
    service.stop()
    return times


def full_disk(folder: Path) -> int:
    """Uploads and jobs on a disk (tmpfs) that fills up, then read-only: 507, clean failures, well again afterwards."""
    mount = folder / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", mount], capture_output=True, check=False
    ).returncode:
        return 0
    service = Service(mount / "data", disk_reserve=0)
    try:
        service.start()
        with service.client() as client:
            kept = put(client, bytes(8_000_000))
            refused = client.put("/v1/uploads/x", content=(bytes(1 << 20) for _ in range(40)))
            require((refused.status_code, refused.json()["code"]) == (507, "storage.full"), refused.text)
            promised = client.post("/v1/uploads", headers=TUS | {"Upload-Length": "40000000"})
            require(promised.status_code == 507, promised.text)
            filler = mount / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(mount).free - 300_000))
            job = wait(client, submit(client, "compress", kept)["id"])
            require(job["state"] in ("failed", "succeeded"), f"{job['state']}")
            big = wait(client, submit(client, "restore", kept)["id"])
            require(big["state"] == "failed", f"{big['state']}")
            filler.unlink()
            require(wait(client, submit(client, "compress", kept)["id"])["state"] == "succeeded", "no recovery")
            spool = mount / "data" / "spool"
            subprocess.run(["mount", "--bind", spool, spool], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", spool], check=True)
            answer = client.put("/v1/uploads/x", content=b"x")
            subprocess.run(["umount", spool], check=True)
            require(answer.status_code == 507, f"read-only: {answer.status_code} {answer.text}")
            require(put(client, b"x"), "no recovery from read-only")
        service.stop()
    finally:
        if service.process is not None and service.process.poll() is None:
            service.kill()
        time.sleep(0.5)
        subprocess.run(["umount", "-l", mount], check=True)
    return 6


def timed(fault: str, expected: str, times: int, run: Callable[[], int]) -> Fault:
    """Run one kind of fault and make its row."""
    started = time.monotonic()
    right = run()
    row = Fault(fault, expected, times, right, round(time.monotonic() - started, 1))
    print(f"{row.fault}: {row.right} of {row.times} right, {row.seconds} s", flush=True)
    return row


def campaign(folder: Path, *, short: bool, seed: int) -> list[Fault]:
    """Every fault; raises Wrong at the first that goes wrong."""
    kills, size = (6, 6_000_000) if short else (200, 64_000_000)
    places = [f"{when}:{phase}" for phase in PHASES for when in ("before", "after")] + ["during:convert"]
    places = ["after:convert", "after:publish"] if short else places
    restarts = 2 if short else 20
    same = "results byte-equal to an undisturbed run"
    rows = [
        timed(
            "kill -9 of the server inside PATCH bodies, unsynced bytes lost or garbled",
            "no acknowledged byte lost; SHA-256 right after resuming",
            kills,
            lambda: upload_kills(folder, kills, size, seed),
        ),
        timed("kill -9 of a worker in every phase of a job", same, len(places), lambda: worker_kills(folder, places)),
        timed(
            "kill -9 of the whole service during jobs", same, restarts, lambda: service_kills(folder, restarts, seed)
        ),
    ]
    if not short:
        rows.append(
            timed("a worker stops, is replaced, and comes back", "one visible end", 1, lambda: silent_worker(folder))
        )
    storm = 10 if short else 100
    rows.append(timed("duplicate submissions across kill -9", "one job", storm, lambda: duplicates(folder, storm)))
    rows.append(timed("disk full, disk read-only", "507 or a clean failure; recovers", 6, lambda: full_disk(folder)))
    return rows


def markdown(rows: list[Fault]) -> str:
    """The table of docs/service.md."""
    lines = ["| fault | times | expected | right |", "| --- | --- | --- | --- |"]
    for row in rows:
        right = str(row.right) if row.right else "not run: this machine lets nobody mount a small disk"
        lines.append(f"| {row.fault} | {row.times} | {row.expected} | {right} |")
    return "\n".join(lines)


def write(rows: list[Fault], seed: int) -> None:
    """Keep the figures, and put the table into the documentation."""
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), "seed": seed}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "faults": [asdict(row) for row in rows]}, indent=2) + "\n")
    text = DOCUMENT.read_text()
    before, rest = text.split(MARKS[0])
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n{markdown(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--write", action="store_true", help="rewrite the results and the table in docs/service.md")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="statecodec-faults-") as folder:
        rows = campaign(Path(folder), short=given.short, seed=given.seed)
    print(markdown(rows))
    if given.write:
        write(rows, given.seed)


if __name__ == "__main__":
    main()
