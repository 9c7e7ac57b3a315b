"""S3 through moto: results and inputs in a bucket, and a named bucket to read from."""

import hashlib
import json
import subprocess
import sys
import time

import httpx
import obstore
import pytest
from obstore.store import S3Store
from service import Service, free_port, put, submit, wait

KEYS = {"access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}
DATA = b"tensor " * 300_000


@pytest.fixture(scope="module")
def s3():
    """A moto server with two buckets."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            httpx.get(url, timeout=5)
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    for bucket in ("results", "lab"):
        httpx.put(
            f"{url}/{bucket}",
            headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"},
        )
    yield url
    process.terminate()
    process.wait()


def options(url):
    return {**KEYS, "endpoint": url, "allow_http": "true"}


@pytest.fixture(scope="module")
def remote(s3, tmp_path_factory):
    lab = {"url": "s3://lab/runs", "options": options(s3)}
    closed = {"url": "s3://lab/runs", "options": options(s3), "tokens": ["someone-else"]}
    data = tmp_path_factory.mktemp("s3") / "data"
    with Service(
        data, storage_url="s3://results/service", storage_options=json.dumps(options(s3)),
        buckets=json.dumps({"lab": lab, "closed": closed}),
    ) as running:  # fmt: skip
        yield running


def store(url, bucket):
    return S3Store(bucket, config={**KEYS, "endpoint": url}, client_options={"allow_http": True})


def test_uploads_and_results_live_in_the_bucket(remote, s3):
    with remote.client() as client:
        upload = put(client, DATA)
        until = time.monotonic() + 20
        while client.get(f"/v1/uploads/{upload}").json()["state"] != "ready" and time.monotonic() < until:
            time.sleep(0.05)
        job = wait(client, submit(client, "compress", upload)["id"])
        assert job["state"] == "succeeded", job
        answer = client.get(job["links"]["result"])
        assert hashlib.sha256(answer.content).hexdigest() == job["files"][0]["sha256"]
        part = client.get(job["links"]["result"], headers={"Range": "bytes=10-99"})
        assert part.content == answer.content[10:100]
        assert client.get(f"/v1/jobs/{job['id']}/tensors/weight").status_code == 200
        restored = wait(client, submit(client, "restore", source={"job": job["id"]})["id"])
        assert client.get(restored["links"]["result"]).content == DATA
        keys = [item["path"] for batch in obstore.list(store(s3, "results")) for item in batch]
        assert {key.split("/")[1] for key in keys} == {"uploads", "results"}
        for one in (job, restored):
            assert client.delete(f"/v1/jobs/{one['id']}").status_code == 204
        assert client.delete(f"/v1/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}).status_code == 204
        assert [item for batch in obstore.list(store(s3, "results")) for item in batch] == []
    assert not list((remote.data / "spool").iterdir())


def test_jobs_read_from_a_named_bucket(remote, s3):
    obstore.put(store(s3, "lab"), "runs/one/ckpt.pt", DATA)
    obstore.put(store(s3, "lab"), "runs/one/more/rng.pt", b"more")
    obstore.put(store(s3, "lab"), "secret/ckpt.pt", b"outside the prefix")
    with remote.client() as client:
        job = wait(client, submit(client, "compress", source={"bucket": "lab", "key": "one/ckpt.pt"})["id"])
        assert (job["state"], job["bytes_in"], job["name"]) == ("succeeded", len(DATA), "ckpt.pt")
        seen = wait(client, submit(client, "inspect", source={"bucket": "lab", "key": "one/"})["id"])
        assert client.get(seen["links"]["report"]).json()["names"] == ["ckpt.pt", "more/rng.pt"]
        for key, status in (("nothing.pt", 422), ("../secret/ckpt.pt", 422), ("/secret/ckpt.pt", 422), ("none/", 422)):
            body = {"operation": "inspect", "source": {"bucket": "lab", "key": key}}
            assert client.post("/v1/jobs", json=body).status_code == status, key
        for bucket in ("closed", "results", "s3://lab"):
            body = {"operation": "inspect", "source": {"bucket": bucket, "key": "one/ckpt.pt"}}
            assert client.post("/v1/jobs", json=body).status_code == 404, bucket
