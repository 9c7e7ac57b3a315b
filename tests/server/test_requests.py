"""Requests as odd clients send them: strings that are no text, encoded bodies, long headers, HEAD, slow uploads."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from service import put, submit, wait

TUS = {"Tus-Resumable": "1.0.0"}
BODY = TUS | {"Content-Type": "application/offset+octet-stream"}
HTTP = Path(__file__).parents[2] / "docs" / "http.md"
LONE = "\ud800"


def create(client, length, **headers):
    answer = client.post("/v1/uploads", headers=TUS | {"Upload-Length": str(length)} | headers)
    assert answer.status_code == 201, answer.text
    return urlsplit(answer.headers["Location"]).path


def is_problem(answer, status, code):
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json"), answer.text
    assert answer.json()["code"] == code, answer.text


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"preset": LONE}},
        {"options": {"rules": [f"{LONE}=raw"]}},
        {"options": {LONE: 1}},
        {"options": {"deep": [{"a": {LONE: [LONE]}}]}},
        {"operation": LONE},
        {"upload": LONE},
        {"source": {"bucket": LONE, "key": "a"}, "upload": None},
        {"source": {"bucket": "a", "key": LONE}, "upload": None},
        {"source": {"url": f"https://a.example/{LONE}"}, "upload": None},
        {"source": {"uploads": [{"upload": "0" * 26, "path": LONE}]}, "upload": None},
        {"other": {"job": LONE}},
        {LONE: 1},
    ],
)
def test_a_string_that_is_no_text_is_refused_by_name(client, change):
    body = {"operation": "compress", "upload": put(client, b"x"), **change}
    body = {name: value for name, value in body.items() if value is not None}
    answer = client.post("/v1/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    is_problem(answer, 422, "usage")


@pytest.mark.parametrize(
    "body", [b"\xff", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"", b"null", b"\xef\xbb\xbf{}"]
)
def test_a_body_that_is_no_json_is_refused(client, body):
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "identity, gzip", "GZIP", "aws-chunked"])
def test_an_encoded_body_is_refused_and_not_stored(client, encoding):
    """What is stored is the file itself: a service that kept the gzip bytes would convert rubbish."""
    data, headers = gzip.compress(b"checkpoint" * 100), {"Content-Encoding": encoding}
    before = len(client.get("/v1/uploads").json())
    refused = client.put("/v1/uploads/ckpt.pt", content=data, headers=headers)
    is_problem(refused, 415, "body.type")
    assert refused.headers["Accept-Encoding"] == "identity"
    is_problem(
        client.post("/v1/uploads", content=data, headers=BODY | headers | {"Upload-Length": "9999"}), 415, "body.type"
    )
    assert len(client.get("/v1/uploads").json()) == before
    path = create(client, len(data))
    is_problem(client.patch(path, content=data, headers=BODY | headers | {"Upload-Offset": "0"}), 415, "body.type")
    assert client.head(path, headers=TUS).headers["Upload-Offset"] == "0"
    is_problem(
        client.post("/v1/jobs", content=b"{}", headers={"Content-Type": "application/json"} | headers), 415, "body.type"
    )


def test_identity_is_no_encoding(client):
    assert client.put("/v1/uploads/x", content=b"x", headers={"Content-Encoding": "Identity"}).status_code == 201


@pytest.mark.parametrize("offset", [11, 12, 1 << 59])
def test_an_offset_beyond_the_end_is_the_wrong_offset(client, offset):
    path = create(client, 10)
    for body in (b"abc", b""):
        answer = client.patch(path, content=body, headers=BODY | {"Upload-Offset": str(offset)})
        is_problem(answer, 409, "upload.offset")
        assert (answer.headers["Upload-Offset"], answer.json()["offset"]) == ("0", 0)


def test_a_trailing_slash_creates_an_upload(client):
    answer = client.post("/v1/uploads/", headers=TUS | {"Upload-Length": "3"})
    assert answer.status_code == 201
    path = urlsplit(answer.headers["Location"]).path
    assert client.patch(path, content=b"abc", headers=BODY | {"Upload-Offset": "0"}).status_code == 204
    assert client.get("/v1/uploads/").json()[0]["id"] == path.rsplit("/", 1)[-1]


def test_head_answers_wherever_get_does(client):
    job = wait(client, submit(client, "compress", put(client, b"x" * 1000))["id"])
    paths = ["/", "/static/app.js", "/livez", "/readyz", "/metrics", "/openapi.json", "/v1/operations", "/v1/jobs"]
    paths += ["/v1/uploads", f"/v1/jobs/{job['id']}", job["links"]["report"], job["links"]["result"]]
    for path in paths:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["Content-Type"] == get.headers["Content-Type"]


@pytest.mark.parametrize("size", [40_000, 100_000, 300_000])
@pytest.mark.parametrize("place", ["header", "target", "many"])
def test_too_long_a_head_gets_431(service, client, size, place):
    head = {
        "header": b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX: " + b"y" * size + b"\r\n\r\n",
        "target": b"GET /livez?" + b"y" * size + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        "many": b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        + b"X: y\r\n" * (size // 6)
        + b"\r\n",
    }[place]
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    first, _, rest = answer.partition(b"\r\n")
    assert b" 431 " in first, answer[:300]
    assert b"application/problem+json" in rest
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["code"] == "header.size"
    assert client.get("/livez").status_code == 200


def test_a_long_but_allowed_head_is_served(client):
    assert client.get("/livez", headers={"X": "y" * 20_000}).status_code == 200


def slowly(data, pause, pieces):
    for start in range(0, len(data), len(data) // pieces):
        yield data[start : start + len(data) // pieces]
        time.sleep(pause)


@pytest.mark.parametrize("checksum", [False, True])
def test_an_upload_lives_as_long_as_its_bytes_come(fresh, checksum):
    """Written for longer than its time to live, without a silence of that length."""
    data = bytes(range(200)) * 50
    service = fresh(ready=False, workers=0, upload_ttl=1.5, sweep_seconds=0.2)
    with service.client() as client:
        path, headers = create(client, len(data)), BODY | {"Upload-Offset": "0"}
        if checksum:
            headers["Upload-Checksum"] = f"sha256 {base64.b64encode(hashlib.sha256(data).digest()).decode()}"
        answer = client.patch(path, content=slowly(data, 0.25, 16), headers=headers)
        assert answer.status_code == 204, answer.text
        assert client.get(path).json()["sha256"] == hashlib.sha256(data).hexdigest()


def test_an_interrupted_body_counts_as_life_too(fresh):
    """A checksummed body that breaks off keeps no byte, and the upload its time."""
    service = fresh(ready=False, workers=0, upload_ttl=30, sweep_seconds=0.2)
    with service.client() as client:
        path = create(client, 1000)
        before = client.get(path).json()["expires"]
        digest = base64.b64encode(bytes(32)).decode()
        answer = client.patch(
            path, content=b"x" * 500, headers=BODY | {"Upload-Offset": "0", "Upload-Checksum": f"sha256 {digest}"}
        )
        assert answer.status_code == 460
        assert client.get(path).json()["expires"] > before


def run_recipe(service, folder, lines):
    env = {"PATH": "/usr/bin:/bin", "STATECODEC_TOKEN": service.token, "HOME": str(folder)}
    command = ["bash", "-euo", "pipefail", "-c", lines]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_the_recipe_of_the_documentation_runs(service, tmp_path):
    """The shell lines of docs/http.md, as they stand there."""
    recipe = re.search(r"```sh\n(.*?)```", HTTP.read_text(), re.DOTALL)[1].replace("http://127.0.0.1:8321", service.url)
    data = b"state " * 100_000
    (tmp_path / "ckpt.pt").write_bytes(data)
    run_recipe(service, tmp_path, recipe)
    made = tmp_path / "ckpt.sc.safetensors"
    whole = made.read_bytes()
    assert 0 < len(whole) < len(data)
    resume = re.search(r"`(-C - -o \S+)`", HTTP.read_text())[1]
    again = recipe.replace("-OJ", f"-s {resume}").replace(
        "jq -r .id)", "jq -r .id); head -c 100 whole > ckpt.sc.safetensors"
    )
    (tmp_path / "whole").write_bytes(whole)
    run_recipe(service, tmp_path, again)
    assert made.read_bytes() == whole
