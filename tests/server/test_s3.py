"""S3 through moto: results and inputs in a bucket, and a named bucket to read from."""

import hashlib
import json
import time

import obstore
import pytest
from service import Service, put, submit, wait

from tests.s3_server import KEYS, bucket_store, s3_server

DATA = b"tensor " * 300_000


@pytest.fixture(scope="module")
def s3():
    """A moto server with two buckets."""
    with s3_server("results", "lab") as url:
        yield url


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
        keys = [item["path"] for batch in obstore.list(bucket_store(s3, "results")) for item in batch]
        assert {key.split("/")[1] for key in keys} == {"uploads", "results"}
        for one in (job, restored):
            assert client.delete(f"/v1/jobs/{one['id']}").status_code == 204
        assert client.delete(f"/v1/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}).status_code == 204
        assert [item for batch in obstore.list(bucket_store(s3, "results")) for item in batch] == []
    assert not list((remote.data / "spool").iterdir())


def test_jobs_read_from_a_named_bucket(remote, s3):
    obstore.put(bucket_store(s3, "lab"), "runs/one/ckpt.pt", DATA)
    obstore.put(bucket_store(s3, "lab"), "runs/one/more/rng.pt", b"more")
    obstore.put(bucket_store(s3, "lab"), "secret/ckpt.pt", b"outside the prefix")
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
