"""Results: ranges, conditions, digests, tars, single tensors, links."""

import hashlib
import io
import json
import tarfile

import pytest
import safetensors
from service import put, submit, wait

from statecodec_server.digests import repr_digest

DATA = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def job(service):
    with service.client() as client:
        return wait(client, submit(client, "compress", put(client, DATA))["id"])


@pytest.fixture(scope="module")
def content(service, job):
    with service.client() as client:
        return client.get(job["links"]["result"]).content


def test_the_whole_carries_its_digest(client, job, content):
    answer = client.get(job["links"]["result"])
    sha256 = hashlib.sha256(content).hexdigest()
    assert job["files"][0]["sha256"] == sha256
    assert answer.headers["ETag"] == f'"{sha256}"'
    assert answer.headers["Repr-Digest"] == repr_digest(sha256)
    assert answer.headers["Accept-Ranges"] == "bytes"
    head = client.head(job["links"]["result"])
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(content)))


@pytest.mark.parametrize(
    "field", ["bytes=0-0", "bytes=10-19", "bytes=-7", "bytes=100-", "bytes=5-99999999", "Bytes=0-1"]
)
def test_one_range(client, job, content, field):
    answer = client.get(job["links"]["result"], headers={"Range": field})
    first, last = field.split("=")[1].split("-")
    start = len(content) - int(last) if not first else int(first)
    stop = len(content) if not first or not last else min(int(last) + 1, len(content))
    assert answer.status_code == 206
    assert answer.content == content[start:stop]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(content)}"


def test_several_ranges(client, job, content):
    answer = client.get(job["links"]["result"], headers={"Range": "bytes=0-9, 100-109, -5"})
    assert answer.status_code == 206
    boundary = answer.headers["Content-Type"].split("boundary=")[1].encode()
    parts = answer.content.split(b"--" + boundary)
    assert parts[-1] == b"--\r\n"
    bodies = [part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in parts[1:-1]]
    assert bodies == [content[:10], content[100:110], content[-5:]]
    assert int(answer.headers["Content-Length"]) == len(answer.content)


@pytest.mark.parametrize(
    "field", ["bytes=", "bytes=x-y", "bytes=5-2", "items=0-1", "bytes=0-5,3-9", "bytes=" + "0-0," * 40]
)
def test_ranges_that_are_ignored(client, job, content, field):
    answer = client.get(job["links"]["result"], headers={"Range": field})
    assert (answer.status_code, answer.content) == (200, content)


def test_a_range_beyond_the_end(client, job, content):
    answer = client.get(job["links"]["result"], headers={"Range": "bytes=99999999-"})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(content)}"


def test_conditions(client, job, content):
    etag = client.head(job["links"]["result"]).headers["ETag"]
    href = job["links"]["result"]
    assert client.get(href, headers={"If-None-Match": etag}).status_code == 304
    assert client.get(href, headers={"If-None-Match": '"else"'}).status_code == 200
    assert client.get(href, headers={"If-Match": '"else"'}).status_code == 412
    assert client.get(href, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206
    assert client.get(href, headers={"Range": "bytes=0-1", "If-Range": '"else"'}).content == content


def test_a_tensor_by_name(client, job, content):
    answer = client.get(f"/v1/jobs/{job['id']}/tensors/weight")
    assert answer.status_code == 200
    tensors = dict(safetensors.deserialize(answer.content))
    assert list(tensors) == ["weight/codes"]
    size = int.from_bytes(content[:8], "little")
    assert bytes(tensors["weight/codes"]["data"]) == content[8 + size : -4]
    header = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])
    assert header["__metadata__"]["codec"] == "raw"
    part = client.get(f"/v1/jobs/{job['id']}/tensors/weight", headers={"Range": "bytes=8-20"})
    assert part.content == answer.content[8:21]
    assert client.get(f"/v1/jobs/{job['id']}/tensors/nothing").status_code == 404
    assert client.get(f"/v1/jobs/{job['id']}/tensors/..%2f..%2fx").status_code == 404


def test_several_files_come_as_one_tar(client):
    members = [{"upload": put(client, bytes([n]) * 1000 * n), "path": f"run/{n}.pt"} for n in (1, 2, 3)]
    job = wait(client, submit(client, "compress", source={"uploads": members})["id"])
    answer = client.get(job["links"]["result"])
    assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        names = tar.getnames()
        assert names == [file["name"] for file in job["files"]]
        for file in job["files"]:
            data = tar.extractfile(file["name"]).read()
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
            assert client.get(file["href"]).content == data
    for start, stop in ((0, 600), (500, 3000), (len(answer.content) - 1500, len(answer.content))):
        part = client.get(job["links"]["result"], headers={"Range": f"bytes={start}-{stop - 1}"})
        assert part.content == answer.content[start:stop]
    assert client.get(f"/v1/jobs/{job['id']}/files/3").status_code == 404


def test_a_link_opens_one_result_without_a_token(service, client, job, content):
    link = client.post(f"/v1/jobs/{job['id']}/link").json()["href"]
    with service.client() as bare:
        bare.headers.pop("Authorization")
        assert bare.get(link).content == content
        assert bare.get(link[:-1] + ("0" if link[-1] != "0" else "1")).status_code == 401
        assert bare.get(link.replace("/result", "/report")).status_code == 401
        other = wait(client, submit(client, "compress", put(client, b"other"))["id"])
        assert bare.get(link.replace(job["id"], other["id"])).status_code == 401


def test_deleting_frees_the_space(service, client):
    job = wait(client, submit(client, "compress", put(client, DATA))["id"])
    folder = service.data / "objects" / "results" / job["id"]
    assert folder.is_dir()
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert not folder.exists()
    assert client.get(job["links"]["result"]).status_code == 404
