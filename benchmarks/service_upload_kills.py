"""Kill the service while an upload arrives, damage what was not acknowledged, and go on: part of service_faults.py."""

from __future__ import annotations

import hashlib
import random
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "server"))
from service import Service

TUS = {"Tus-Resumable": "1.0.0"}
BODY = TUS | {"Content-Type": "application/offset+octet-stream"}


class Wrong(AssertionError):
    """The service did what it must never do."""


def require(condition: object, message: str) -> None:
    """Stop the campaign with a message."""
    if not condition:
        raise Wrong(message)


def upload_kills(folder: Path, kills: int, size: int, seed: int) -> int:
    """kill -9 in the middle of PATCH bodies; returns how many kills went by with nothing lost and nothing wrong.

    After each kill the bytes beyond the acknowledged offset are replaced by garbage or zeros or cut, as a power cut may
    leave them. An acknowledged offset must never shrink, and the finished upload must have the right SHA-256.
    """
    rng = random.Random(seed)
    service = Service(folder / "uploads", workers=0, log_level="ERROR").start(ready=False)
    done = 0
    while done < kills:
        data = rng.randbytes(size)
        with service.client() as client:
            created = client.post("/v1/uploads", headers=TUS | {"Upload-Length": str(size)})
        path = httpx.URL(created.headers["Location"]).path
        acknowledged = 0
        for _ in range(12):
            if done == kills or size - acknowledged < 2:
                break
            acknowledged = _send_acknowledged(service, path, data, acknowledged, rng)
            _send_and_kill(service, path, data, acknowledged, rng)
            _lose_cache(folder / "uploads" / "spool" / path.rsplit("/", 1)[-1], acknowledged, rng)
            service.start(ready=False)
            now = _offset(service, path)
            require(now >= acknowledged, f"offset {acknowledged} was acknowledged, {now} is left")
            acknowledged, done = now, done + 1
        with service.client() as client:
            answer = client.patch(
                path, content=data[acknowledged:], headers=BODY | {"Upload-Offset": str(acknowledged)}
            )
            require(answer.status_code == 204, f"resuming was refused: {answer.text}")
            found = client.get(path).json()
            require(found["sha256"] == hashlib.sha256(data).hexdigest(), "the whole has the wrong SHA-256")
            stored = folder / "uploads" / "objects" / "uploads" / found["id"] / "0"
            require(stored.read_bytes() == data, "the stored bytes are wrong")
            client.delete(path, headers=TUS)
    service.stop()
    return done


def _offset(service: Service, path: str) -> int:
    with service.client() as client:
        return int(client.head(path, headers=TUS).headers["Upload-Offset"])


def _send_acknowledged(service: Service, path: str, data: bytes, offset: int, rng: random.Random) -> int:
    piece = data[offset : offset + rng.randrange(0, len(data) // 12)]
    with service.client() as client:
        answer = client.patch(path, content=piece, headers=BODY | {"Upload-Offset": str(offset)})
    require(answer.status_code == 204, answer.text)
    return offset + len(piece)


def _send_and_kill(service: Service, path: str, data: bytes, offset: int, rng: random.Random) -> None:
    rest = data[offset:]
    head = (
        f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\nAuthorization: Bearer {service.token}\r\n"
        f"Tus-Resumable: 1.0.0\r\nUpload-Offset: {offset}\r\nContent-Type: application/offset+octet-stream\r\n"
        f"Content-Length: {len(rest)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(head.encode())
    at = rng.choice((0, 1, len(rest), rng.randrange(len(rest)), rng.randrange(len(rest))))
    sender = threading.Thread(target=_send_quietly, args=(connection, rest[:at]))
    sender.start()
    time.sleep(rng.choice((0.0, 0.002, 0.01, 0.05)))
    service.kill()
    connection.close()
    sender.join()


def _send_quietly(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return  # the server is dead: that is the point


def _lose_cache(spool: Path, acknowledged: int, rng: random.Random) -> None:
    """What a power cut may do to bytes that were written and not fsynced."""
    database = spool.parent.parent / "service.sqlite"
    recorded = _recorded(database, spool.name)
    if not spool.exists() or recorded is None or spool.stat().st_size <= recorded:
        return
    beyond = spool.stat().st_size - recorded
    with spool.open("r+b") as file:
        file.seek(recorded)
        how = rng.randrange(4)
        if how == 0:
            file.truncate(recorded)
        elif how == 1:
            file.write(bytes(beyond))
        elif how == 2:
            file.write(rng.randbytes(beyond))


def _recorded(database: Path, identity: str) -> int | None:
    connection = sqlite3.connect(database)
    try:
        row = connection.execute("SELECT offset FROM service_uploads WHERE id = ?", (identity,)).fetchone()
    finally:
        connection.close()
    return None if row is None else int(row[0])
