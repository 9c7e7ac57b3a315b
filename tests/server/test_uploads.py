"""Uploads against a real server: tus with its own Python client, checksums, interruptions, PUT."""

import base64
import hashlib
import io
import os
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from service import put
from tusclient import client as tus
from tusclient.exceptions import TusCommunicationError

TUS = {"Tus-Resumable": "1.0.0"}
BODY = TUS | {"Content-Type": "application/offset+octet-stream"}
DATA = os.urandom(3_000_001)
SIZE = len(DATA)
SHA256 = hashlib.sha256(DATA).hexdigest()


def create(client, length=SIZE, **headers):
    answer = client.post("/v1/uploads", headers=TUS | {"Upload-Length": str(length)} | headers)
    assert answer.status_code == 201, answer.text
    return urlsplit(answer.headers["Location"]).path


def patch(client, path, offset, data, **headers):
    return client.patch(path, content=data, headers=BODY | {"Upload-Offset": str(offset)} | headers)


def offset(client, path):
    answer = client.head(path, headers=TUS)
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    return int(answer.headers["Upload-Offset"])


def tus_client(service, **headers):
    return tus.TusClient(service.url + "/v1/uploads", headers={"Authorization": f"Bearer {service.token}"} | headers)


def test_tuspy_uploads_in_chunks(service, client):
    upload = tus_client(service).uploader(
        file_stream=io.BytesIO(DATA), chunk_size=700_000, metadata={"filename": "optimizer.pt"}, upload_checksum=True
    )
    upload.upload()
    found = client.get(urlsplit(upload.url).path).json()
    assert (found["state"], found["sha256"], found["name"]) == ("ready", SHA256, "optimizer.pt")


def test_tuspy_resumes_where_the_server_is(service, client):
    first = tus_client(service).uploader(file_stream=io.BytesIO(DATA), chunk_size=500_000)
    first.upload_chunk()
    second = tus_client(service).uploader(file_stream=io.BytesIO(DATA), chunk_size=500_000, url=first.url)
    assert second.offset == 500_000
    second.upload()
    assert client.get(urlsplit(first.url).path).json()["sha256"] == SHA256


def test_tuspy_is_refused_without_a_token(service):
    with pytest.raises(TusCommunicationError):
        tus_client(service, Authorization="").uploader(file_stream=io.BytesIO(b"x")).upload()


def test_options_says_what_it_can(client):
    answer = client.options("/v1/uploads")
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert set(answer.headers["Tus-Extension"].split(",")) == {
        "creation", "creation-with-upload", "expiration", "checksum", "termination",
    }  # fmt: skip
    assert "sha1" in answer.headers["Tus-Checksum-Algorithm"]


def test_another_version_of_tus_is_refused(client):
    answer = client.post("/v1/uploads", headers={"Tus-Resumable": "0.2.2", "Upload-Length": "1"})
    assert answer.status_code == 412
    assert answer.headers["Tus-Version"] == "1.0.0"


def test_creation_with_upload_and_expiry(client):
    answer = client.post("/v1/uploads", content=DATA[:1000], headers=BODY | {"Upload-Length": str(len(DATA))})
    assert answer.headers["Upload-Offset"] == "1000"
    assert answer.headers["Upload-Expires"].endswith("GMT")
    path = urlsplit(answer.headers["Location"]).path
    answer = patch(client, path, 1000, DATA[1000:])
    assert answer.status_code == 204
    assert answer.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(bytes.fromhex(SHA256)).decode()}:"


def test_an_empty_upload_is_complete_at_once(client):
    found = client.get(create(client, 0)).json()
    assert (found["state"], found["sha256"]) == ("ready", hashlib.sha256(b"").hexdigest())


def test_only_the_acknowledged_offset_is_accepted(client):
    path = create(client)
    assert patch(client, path, 0, DATA[:100]).status_code == 204
    for wrong in (0, 99, 101, len(DATA)):
        answer = patch(client, path, wrong, b"x" * 10 if wrong < len(DATA) else b"")
        assert (answer.status_code, answer.json()["code"]) == (409, "upload.offset")
    assert offset(client, path) == 100


def test_a_body_beyond_the_length_is_refused_and_not_kept(client):
    path = create(client, 100)
    answer = patch(client, path, 0, b"x" * 101)
    assert (answer.status_code, answer.json()["code"]) == (400, "upload.length")
    answer = client.patch(path, content=iter([b"x" * 60, b"x" * 60]), headers=BODY | {"Upload-Offset": "0"})
    assert (answer.status_code, answer.json()["code"]) == (400, "upload.length")
    assert offset(client, path) == 0


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "md5"])
def test_a_wrong_checksum_keeps_nothing(client, algorithm):
    path = create(client)
    right = base64.b64encode(hashlib.new(algorithm, DATA[:500_000]).digest()).decode()
    wrong = base64.b64encode(hashlib.new(algorithm, b"else").digest()).decode()
    answer = patch(client, path, 0, DATA[:500_000], **{"Upload-Checksum": f"{algorithm} {wrong}"})
    assert (answer.status_code, answer.json()["code"]) == (460, "upload.checksum")
    assert offset(client, path) == 0
    assert patch(client, path, 0, DATA[:500_000], **{"Upload-Checksum": f"{algorithm} {right}"}).status_code == 204
    assert patch(client, path, 500_000, DATA[500_000:]).status_code == 204
    assert client.get(path).json()["sha256"] == SHA256


@pytest.mark.parametrize("field", ["crc32 AAAA", "sha1 !!", "sha1 AAAA", "sha1", ""])
def test_a_malformed_checksum_is_refused(client, field):
    assert patch(client, create(client), 0, b"x", **{"Upload-Checksum": field}).status_code == 400


def test_a_wrong_whole_is_refused_and_gone(client, service):
    digest = base64.b64encode(hashlib.sha256(b"else").digest()).decode()
    path = create(client, 10, **{"Repr-Digest": f"sha-256=:{digest}:"})
    answer = patch(client, path, 0, b"0123456789")
    assert (answer.status_code, answer.json()["code"]) == (422, "upload.digest")
    assert client.head(path, headers=TUS).status_code == 410
    assert patch(client, path, 10, b"").status_code == 410
    identity = path.rsplit("/", 1)[-1]
    assert not (service.data / "objects" / "uploads" / identity).exists()
    assert not (service.data / "spool" / identity).exists()


def test_termination_frees_the_space(client, service):
    path = create(client)
    patch(client, path, 0, DATA[:1000])
    spool = service.data / "spool" / path.rsplit("/", 1)[-1]
    assert spool.stat().st_size == 1000
    assert client.delete(path, headers=TUS).status_code == 204
    assert not spool.exists()
    assert client.head(path, headers=TUS).status_code == 404


def test_method_override(client):
    path = create(client)
    headers = BODY | {"Upload-Offset": "0", "X-HTTP-Method-Override": "PATCH"}
    assert client.post(path, content=b"abc", headers=headers).status_code == 204
    assert offset(client, path) == 3


def half_open(service, path, length, data):
    """A PATCH whose body stops in the middle while the connection stays open."""
    connection = socket.create_connection(("127.0.0.1", service.port))
    head = (
        f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\nAuthorization: Bearer {service.token}\r\n"
        f"Tus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\nContent-Type: application/offset+octet-stream\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def spooled(service, path):
    file = service.data / "spool" / path.rsplit("/", 1)[-1]
    return file.stat().st_size if file.exists() else 0


def test_asking_for_the_offset_ends_a_stuck_request_and_keeps_what_came(service, client):
    path = create(client)
    connection = half_open(service, path, len(DATA), DATA[:2_000_000])
    until = time.monotonic() + 10
    while spooled(service, path) < 1_000_000 and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    began = time.monotonic()
    assert offset(client, path) == 2_000_000
    assert time.monotonic() - began < 10
    assert b" 503 " in connection.recv(100)
    connection.close()
    assert patch(client, path, 2_000_000, DATA[2_000_000:]).status_code == 204
    assert client.get(path).json()["sha256"] == SHA256


def test_a_reset_connection_keeps_what_came(service, client):
    path = create(client)
    connection = half_open(service, path, len(DATA), DATA[:1_500_000])
    time.sleep(0.3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() sends RST
    connection.close()
    at = offset(client, path)
    assert 0 < at <= 1_500_000
    assert patch(client, path, at, DATA[at:]).status_code == 204
    assert client.get(path).json()["sha256"] == SHA256


def test_an_interrupted_checksummed_body_keeps_nothing(service, client):
    path = create(client)
    connection = socket.create_connection(("127.0.0.1", service.port))
    head = (
        f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\nAuthorization: Bearer {service.token}\r\n"
        f"Tus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\nContent-Type: application/offset+octet-stream\r\n"
        f"Upload-Checksum: sha1 {base64.b64encode(hashlib.sha1(DATA).digest()).decode()}\r\n"
        f"Content-Length: {len(DATA)}\r\n\r\n"
    )
    connection.sendall(head.encode() + DATA[:2_000_000])
    time.sleep(0.3)
    connection.close()
    assert offset(client, path) == 0


def test_a_request_that_is_stopped_behind_its_last_byte_has_uploaded_everything(client, service):
    """The end of a chunked body does not come, and somebody else asks for the offset."""
    path = create(client)
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = (
            f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\nAuthorization: Bearer {service.token}\r\n"
            "Tus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\nContent-Type: application/offset+octet-stream\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n{len(DATA):x}\r\n"
        )
        connection.sendall(head.encode() + DATA + b"\r\n")
        time.sleep(0.5)
        while offset(client, path) < len(DATA):
            time.sleep(0.1)
        assert connection.recv(100).startswith(b"HTTP/1.1 204")
    assert client.get(path).json()["sha256"] == SHA256


def test_many_clients_on_one_upload_leave_it_right(client, service):
    path = create(client)

    def fight():
        with service.client() as mine:
            while (at := offset(mine, path)) < len(DATA):
                answer = patch(mine, path, at, DATA[at : at + 400_000])
                assert answer.status_code in (204, 409, 503), answer.text

    fighters = [threading.Thread(target=fight) for _ in range(4)]
    for fighter in fighters:
        fighter.start()
    for fighter in fighters:
        fighter.join()
    assert client.get(path).json()["sha256"] == SHA256


def test_put_takes_a_raw_body(client):
    digest = base64.b64encode(bytes.fromhex(SHA256)).decode()
    answer = client.put("/v1/uploads/ckpt.pt", content=DATA, headers={"Repr-Digest": f"sha-256=:{digest}:"})
    assert answer.status_code == 201
    assert (answer.json()["sha256"], answer.json()["name"], answer.json()["state"]) == (SHA256, "ckpt.pt", "ready")
    assert client.get(answer.headers["Location"]).json() == answer.json()


def test_put_takes_a_body_of_unknown_length(client):
    parts = (DATA[at : at + 100_000] for at in range(0, len(DATA), 100_000))
    answer = client.put("/v1/uploads/ckpt.pt", content=parts)
    assert (answer.json()["sha256"], answer.json()["length"]) == (SHA256, len(DATA))


def test_put_with_a_wrong_digest_leaves_nothing(client):
    before = len(client.get("/v1/uploads").json())
    digest = base64.b64encode(bytes(32)).decode()
    answer = client.put("/v1/uploads/ckpt.pt", content=DATA, headers={"Repr-Digest": f"sha-256=:{digest}:"})
    assert (answer.status_code, answer.json()["code"]) == (422, "upload.digest")
    assert len(client.get("/v1/uploads").json()) == before


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "C:%5Cx", "%F0%9F%92%BE.pt"])
def test_a_name_is_only_shown(client, service, name):
    answer = client.put(f"/v1/uploads/{name}", content=b"data")
    assert answer.status_code in (201, 404, 405), answer.text
    if answer.status_code == 201:
        shown = answer.json()["name"]
        assert "/" not in shown
        assert "\\" not in shown
        assert "\0" not in shown
        assert (service.data / "objects" / "uploads" / answer.json()["id"] / "0").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({"Upload-Length": "-1"}, 400),
        ({"Upload-Length": "1e3"}, 400),
        ({"Upload-Length": "9" * 30}, 400),
        ({"Upload-Length": str(10**18)}, 413),
        ({"Upload-Length": "1", "Upload-Metadata": "filename ?"}, 400),
        ({"Upload-Length": "1", "Upload-Metadata": "a YQ==,a YQ=="}, 400),
        ({"Upload-Length": "1", "Upload-Metadata": "x " + "A" * 9000}, 400),
        ({"Upload-Length": "1", "Repr-Digest": "md5=:AAAA:"}, 422),
    ],
)
def test_malformed_creations_are_refused(client, headers, status):
    answer = client.post("/v1/uploads", headers=TUS | headers)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_patch_takes_one_content_type(client):
    answer = client.patch(create(client), content=b"x", headers=TUS | {"Upload-Offset": "0"})
    assert (answer.status_code, answer.json()["code"]) == (415, "body.type")


def test_the_upload_is_found_by_jobs(client):
    identity = put(client, b"hello")
    assert client.get(f"/v1/uploads/{identity}").json()["state"] == "ready"
