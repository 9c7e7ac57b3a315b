"""Load on the conversion service: many large uploads at once, many pollers and listeners while jobs run.

    python benchmarks/service_load.py                 8 uploads of 500 MB, 200 pollers, 50 event streams (`make load`)
    python benchmarks/service_load.py --short         smaller, for a quick look

Loopback only, a real server process, bounded: it stops by itself after at most a few minutes. Prints JSON, keeps it in
benchmarks/results/service_load.json and writes the table of docs/service.md. What is judged: resident memory of the
HTTP process must not grow by more than 64 MiB over idle; throughput is given as a ratio to writing the same bytes to
the same disk with fsync.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "server"))
from service import Service, put, submit, wait  # noqa: E402

BLOCK = os.urandom(1 << 20)
TUS = {"Tus-Resumable": "1.0.0"}
LIMIT = 64 << 20
MARKS = ("<!-- load: begin -->", "<!-- load: end -->")


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """The largest resident memory seen."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        """Look twenty times a second."""
        while not self.done.wait(0.05):
            self.peak = max(self.peak, resident(self.pid))


def disk_rate(folder: Path, nbytes: int, files: int) -> float:
    """Bytes per second of writing `files` files one after another in 1 MiB writes, each fsynced."""
    started = time.perf_counter()
    for index in range(files):
        with (folder / f"plain{index}").open("wb") as file:
            for _ in range(nbytes // len(BLOCK)):
                file.write(BLOCK)
            file.flush()
            os.fsync(file.fileno())
    elapsed = time.perf_counter() - started
    for index in range(files):
        (folder / f"plain{index}").unlink()
    return nbytes // len(BLOCK) * len(BLOCK) * files / elapsed


async def _body(nbytes: int) -> AsyncIterator[bytes]:
    for _ in range(nbytes // len(BLOCK)):
        yield BLOCK


async def _upload(client: httpx.AsyncClient, nbytes: int) -> str:
    length = nbytes // len(BLOCK) * len(BLOCK)
    created = await client.post("/v1/uploads", headers=TUS | {"Upload-Length": str(length)})
    path = httpx.URL(created.headers["Location"]).path
    headers = TUS | {
        "Upload-Offset": "0",
        "Content-Type": "application/offset+octet-stream",
        "Content-Length": str(length),
    }
    answer = await client.patch(path, content=_body(nbytes), headers=headers)
    answer.raise_for_status()
    return path


def uploads(service: Service, count: int, nbytes: int) -> tuple[float, list[str]]:
    """Bytes per second of `count` simultaneous uploads."""

    async def run() -> list[str]:
        headers = {"Authorization": f"Bearer {service.token}"}
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=300) as client:
            return list(await asyncio.gather(*(_upload(client, nbytes) for _ in range(count))))

    started = time.perf_counter()
    paths = asyncio.run(run())
    return count * (nbytes // len(BLOCK)) * len(BLOCK) / (time.perf_counter() - started), paths


async def _poll(client: httpx.AsyncClient, job: str, until: float, times: list[float]) -> None:
    while time.perf_counter() < until:
        started = time.perf_counter()
        answer = await client.get(f"/v1/jobs/{job}")
        answer.raise_for_status()
        times.append(time.perf_counter() - started)
        await asyncio.sleep(max(0.0, 1.0 - (time.perf_counter() - started)))


async def _listen(client: httpx.AsyncClient, job: str, seen: list[int]) -> None:
    count = 0
    async with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            count += line.startswith("data: ")
    seen.append(count)


def watchers(service: Service, pollers: int, listeners: int, seconds: float) -> dict[str, Any]:
    """`pollers` clients that ask once a second and `listeners` event streams, while jobs run."""
    with service.client() as client:
        slow = put(client, f"BEHAVE slow {int(seconds * 12)}\n".encode() + b"x" * 1000)
        job = submit(client, "compress", slow)["id"]
    times: list[float] = []
    seen: list[int] = []

    async def run() -> None:
        headers = {"Authorization": f"Bearer {service.token}"}
        limits = httpx.Limits(max_connections=pollers + listeners)
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=60, limits=limits) as client:
            until = time.perf_counter() + seconds
            await asyncio.wait_for(
                asyncio.gather(
                    *(_poll(client, job, until, times) for _ in range(pollers)),
                    *(_listen(client, job, seen) for _ in range(listeners)),
                ),
                seconds * 6 + 60,
            )

    asyncio.run(run())
    with service.client() as client:
        state = wait(client, job)["state"]
    ordered = sorted(times)
    return {
        "pollers": pollers,
        "listeners": listeners,
        "polls": len(times),
        "poll_seconds_median": round(statistics.median(ordered), 4),
        "poll_seconds_p99": round(ordered[int(len(ordered) * 0.99)], 4),
        "events_per_listener_min": min(seen),
        "listeners_that_heard_the_end": len(seen),
        "job": state,
    }


def measure(folder: Path, *, short: bool) -> dict[str, Any]:
    """All of it."""
    count, nbytes = (4, 32 << 20) if short else (8, 500 * 10**6)
    pollers, listeners, seconds = (20, 10, 4.0) if short else (200, 50, 20.0)
    plain = disk_rate(folder, nbytes, count)
    with Service(folder / "data", body_timeout=120, log_level="WARNING") as service:
        time.sleep(1)
        idle = resident(service.process.pid)
        watch = Watch(service.process.pid)
        watch.start()
        rate, paths = uploads(service, count, nbytes)
        watched = watchers(service, pollers, listeners, seconds)
        watch.done.set()
        watch.join()
        with service.client() as client:
            for path in paths:
                client.delete(path, headers=TUS)
    growth = watch.peak - idle
    return {
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "load_average_at_end": os.getloadavg()[0]},
        "uploads": {"count": count, "bytes_each": nbytes, "bytes_per_second": round(rate)},
        "plain_fsynced_bytes_per_second": round(plain),
        "ratio_to_plain": round(rate / plain, 3),
        "rss_idle": idle,
        "rss_peak": watch.peak,
        "rss_growth": growth,
        "rss_growth_allowed": LIMIT,
        "watchers": watched,
        "ok": growth <= LIMIT
        and watched["listeners_that_heard_the_end"] == listeners
        and watched["job"] == "succeeded",
    }


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/service.md."""
    sent, watched = found["uploads"], found["watchers"]
    load = found["machine"]["load_average_at_end"]
    rows = [
        ("uploads at once", f"{sent['count']} of {sent['bytes_each'] / 1e6:.0f} MB"),
        ("throughput, all together", f"{sent['bytes_per_second'] / 1e6:.0f} MB/s"),
        ("as a ratio to writing the same bytes to the same disk with fsync", f"{found['ratio_to_plain']:.2f}"),
        ("memory of the HTTP process over idle, at most", f"{found['rss_growth'] / 2**20:.0f} MiB (allowed: 64)"),
        ("pollers, once a second each, while a job ran", f"{watched['pollers']}"),
        (
            "answer to a poll, median / 99th percentile",
            f"{watched['poll_seconds_median']:.2f} s / {watched['poll_seconds_p99']:.2f} s",
        ),
        ("event streams at the same time, all of which heard the end", f"{watched['listeners_that_heard_the_end']}"),
        ("machine", f"{found['machine']['cpus']} cores, clients on the same ones, load average {load:.1f}"),
    ]
    return "\n".join(["| measured | |", "| --- | --- |", *(f"| {left} | {right} |" for left, right in rows)])


def write(found: dict[str, Any]) -> None:
    """Keep the figures, and put the table into the documentation."""
    results, document = ROOT / "benchmarks" / "results" / "service_load.json", ROOT / "docs" / "service.md"
    results.write_text(json.dumps(found, indent=2) + "\n")
    text = document.read_text()
    before, rest = text.split(MARKS[0])
    document.write_text(f"{before}{MARKS[0]}\n{markdown(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--dir", help="where to put the data; the disk that is measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="statecodec-load-", dir=given.dir) as folder:
        found = measure(Path(folder), short=given.short)
    print(json.dumps(found, indent=2))
    if not given.short:
        write(found)
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
