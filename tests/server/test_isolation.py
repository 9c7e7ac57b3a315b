"""What one token cannot do to another, and what nobody can do without one: tried, route by route."""

import json
import subprocess
import sys
import time

import pytest
from service import put, submit, wait

from statecodec_server.tokens import CACHE_SECONDS

TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture(scope="module")
def theirs(service):
    with service.client() as client:
        upload = put(client, b"secret " * 1000)
        job = wait(client, submit(client, "compress", upload, key="shared-key")["id"])
        open_upload = client.post("/v1/uploads", headers=TUS | {"Upload-Length": "10"}).headers["Location"]
        return {"upload": upload, "job": job["id"], "open": open_upload.rsplit("/", 1)[-1]}


def attempts(theirs):
    upload, job, unfinished = theirs["upload"], theirs["job"], theirs["open"]
    body = TUS | {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    return [
        ("GET", f"/v1/uploads/{upload}", {}),
        ("HEAD", f"/v1/uploads/{unfinished}", {"headers": TUS}),
        ("PATCH", f"/v1/uploads/{unfinished}", {"headers": body, "content": b"0123456789"}),
        ("DELETE", f"/v1/uploads/{upload}", {"headers": TUS}),
        ("GET", f"/v1/jobs/{job}", {}),
        ("GET", f"/v1/jobs/{job}/events", {}),
        ("GET", f"/v1/jobs/{job}/result", {}),
        ("HEAD", f"/v1/jobs/{job}/result", {}),
        ("GET", f"/v1/jobs/{job}/files/0", {}),
        ("GET", f"/v1/jobs/{job}/tensors/weight", {}),
        ("GET", f"/v1/jobs/{job}/report", {}),
        ("POST", f"/v1/jobs/{job}/link", {}),
        ("POST", f"/v1/jobs/{job}/cancel", {}),
        ("DELETE", f"/v1/jobs/{job}", {}),
        ("POST", "/v1/jobs", {"json": {"operation": "inspect", "upload": upload}}),
        ("POST", "/v1/jobs", {"json": {"operation": "inspect", "source": {"job": job}}}),
        ("POST", "/v1/jobs", {"json": {"operation": "diff", "upload": upload, "other": {"upload": upload}}}),
    ]


def test_another_token_finds_nothing(service, second_token, theirs):
    with service.client(second_token) as stranger:
        for method, path, options in attempts(theirs):
            answer = stranger.request(method, path, **options)
            assert answer.status_code == 404, (method, path, answer.text)
        assert stranger.get("/v1/jobs").json() == []
        assert stranger.get("/v1/uploads").json() == []
        mine = submit(stranger, "inspect", put(stranger, b"mine"), key="shared-key")
        assert mine["id"] != theirs["job"]
    with service.client() as owner:
        assert owner.get(f"/v1/uploads/{theirs['upload']}").json()["state"] == "ready"
        assert owner.get(f"/v1/jobs/{theirs['job']}").json()["state"] == "succeeded"
        assert owner.get(f"/v1/uploads/{theirs['open']}").json()["offset"] == 0


@pytest.mark.parametrize("token", ["0", "nonsense", "sct_00000000_" + "x" * 43, "sct_"])
def test_without_a_token_everything_is_401(service, theirs, token):
    with service.client() as client:
        client.headers["Authorization"] = f"Bearer {token}"
        for method, path, options in [*attempts(theirs), ("GET", "/v1/operations", {}), ("GET", "/v1/jobs", {})]:
            answer = client.request(method, path, **options)
            assert answer.status_code == 401, (method, path, answer.text)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_every_route_of_the_api_asks_for_a_token(service, client):
    """Whatever is added to the API later: no route under /v1 answers anybody."""
    document = client.get("/openapi.json").json()
    checked = 0
    for path, methods in document["paths"].items():
        for method in methods:
            if not path.startswith("/v1"):
                continue
            filled = (
                path.replace("{job}", "0" * 26)
                .replace("{upload}", "0" * 26)
                .replace("{index}", "0")
                .replace("{name}", "x")
            )
            client.headers.pop("Authorization", None)
            answer = client.request(
                method.upper(), filled, headers=TUS, json={"operation": "inspect", "upload": "0" * 26}
            )
            assert answer.status_code == 401, (method, path)
            checked += 1
    assert checked >= 15


def test_tokens_are_stored_hashed(service):
    stored = b"".join(path.read_bytes() for path in service.data.glob("service.sqlite*"))
    assert service.token.split("_")[2].encode() not in stored
    assert service.token.split("_")[1].encode() in stored


def test_revoking_takes_effect(service):
    def token(action):
        command = [sys.executable, "-m", "statecodec_server", "token", action, "leaver"]
        done = subprocess.run(command, env=service.environment(), check=True, capture_output=True, text=True)
        return done.stdout.strip()

    with service.client(token("add")) as client:
        assert client.get("/v1/jobs").status_code == 200
        token("revoke")
        time.sleep(CACHE_SECONDS + 0.1)
        assert client.get("/v1/jobs").status_code == 401


def test_pages_of_other_sites_are_refused(service, client):
    assert client.get("/v1/jobs", headers={"Origin": "https://evil.example"}).json()["code"] == "auth.origin"
    assert client.get("/v1/jobs", headers={"Origin": "null"}).status_code == 403
    assert client.get("/v1/jobs", headers={"Origin": service.url}).status_code == 200
    preflight = client.options(
        "/v1/jobs", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 403
    assert not [name for name in preflight.headers if name.lower().startswith("access-control")]


def test_a_rebound_name_is_refused(client):
    for host in ("evil.example", "evil.example:8321", "127.0.0.1.evil.example", ""):
        assert client.get("/livez", headers={"Host": host}).status_code in (400, 403), host
    assert client.get("/livez", headers={"Host": "localhost:1"}).status_code == 200


def test_security_headers_are_everywhere(client):
    for path in ("/", "/v1/jobs", "/nothing", "/static/app.js", "/openapi.json"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"], path
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_errors_are_problem_documents(client):
    for answer in (client.get("/nothing"), client.post("/livez"), client.post("/v1/jobs", json=[])):
        assert answer.headers["Content-Type"] == "application/problem+json"
        document = json.loads(answer.content)
        assert {"type", "title", "status", "detail", "code"} <= set(document)
        assert document["status"] == answer.status_code
