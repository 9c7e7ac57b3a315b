"""An S3 server of this machine (moto), for as long as a block lasts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

KEYS = {"access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}


@contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """A server with these buckets; gives its URL."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        for bucket in buckets:
            credential = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
            httpx.put(f"{url}/{bucket}", headers={"Authorization": credential})
        yield url
    finally:
        process.terminate()
        process.wait()


def bucket_store(url: str, bucket: str) -> Any:
    """A bucket of the server, as obstore sees it."""
    from obstore.store import S3Store

    return S3Store(bucket, config={**KEYS, "endpoint": url}, client_options={"allow_http": True})
