"""The small parts by themselves: settings, names, addresses, ranges, tokens, quotas, spool files, start-up."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from service import free_port, put, submit, wait

from statecodec.operations import OPERATIONS
from statecodec_server import fetch
from statecodec_server.main import StartRefused, check
from statecodec_server.names import clean_name, content_disposition, display_name, member_path
from statecodec_server.operations import offers
from statecodec_server.problems import HTTPProblem
from statecodec_server.ranges import parse_ranges
from statecodec_server.settings import CONFIG_VARIABLE, Settings, is_loopback
from statecodec_server.spool import Spool


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nworkers = 1\nmax_upload = "5GB"\n[buckets]\nlab = "s3://lab/x"\n')
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    monkeypatch.setenv("STATECODEC_SERVER_WORKERS", "2")
    found = Settings(host="127.0.0.9")
    assert (found.host, found.workers, found.port, found.max_upload) == ("127.0.0.9", 2, 1, 5 * 10**9)
    assert found.buckets["lab"].url == "s3://lab/x"


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"colour": 1}, {"max_upload": "many"}, {"storage_url": "folder"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("[::1]", True),
        ("0.0.0.0", False), ("127.0.0.1.evil.example", False), ("10.0.0.1", False), ("::", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_without_tokens_only_on_loopback():
    check(Settings(auth=False))
    with pytest.raises(StartRefused, match="without tokens"):
        check(Settings(auth=False, host="0.0.0.0"))


def server(tmp_path, *arguments, **env):
    env = {"PATH": os.environ["PATH"], "STATECODEC_SERVER_DATA": str(tmp_path / "data")} | env
    return subprocess.run(
        [sys.executable, "-m", "statecodec_server", *arguments], env=env, capture_output=True, text=True, timeout=60
    )


def test_it_refuses_to_start_publicly_without_tokens(tmp_path):
    done = server(tmp_path, "--host", "0.0.0.0", "--no-auth")
    assert done.returncode == 1
    assert "refusing" in done.stderr


def test_the_first_start_prints_a_token_and_later_ones_do_not(fresh):
    service = fresh(ready=False, workers=0)
    assert re.search(r"open +http://127\.0\.0\.1:\d+/#token=sct_", "".join(service.output))
    token, service.output = service.token, []
    assert service.stop() == 0
    service.start(ready=False)
    assert "sct_" not in "".join(service.output)
    while "token add NAME" not in "".join(service.output):
        time.sleep(0.02)
    with service.client(token) as client:
        assert client.get("/v1/jobs").status_code == 200
    second = subprocess.run(
        [sys.executable, "-m", "statecodec_server", "--port", str(free_port())],
        env=service.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert "another service is using" in second.stderr


def test_looking_at_tokens_makes_no_data_folder(tmp_path):
    for arguments in (["token", "list"], ["token", "revoke", "x"]):
        done = server(tmp_path, *arguments)
        assert done.returncode == 1
        assert "no service has kept anything" in done.stderr
        assert not (tmp_path / "data").exists()
    assert server(tmp_path, "token", "add", "x").stdout.startswith("sct_")
    assert server(tmp_path, "token", "list").stdout == "x\n"


def test_metrics_and_logs_tell_what_happened(fresh):
    service = fresh()
    with service.client() as client:
        upload = put(client, b"x" * 10_000)
        answer = client.post(
            "/v1/jobs", json={"operation": "compress", "upload": upload}, headers={"X-Request-Id": "my-request.1"}
        )
        assert answer.headers["X-Request-Id"] == "my-request.1"
        job = wait(client, answer.json()["id"])
        text = client.get("/metrics").text
    assert 'statecodec_jobs_ended_total{operation="compress",state="succeeded"} 1.0' in text
    assert "statecodec_upload_bytes_total 10000.0" in text
    assert 'statecodec_job_seconds_count{operation="compress"} 1.0' in text
    assert "statecodec_compression_ratio_count 1.0" in text
    assert 'statecodec_jobs_open{state="queued"} 0.0' in text
    assert 'route="/v1/jobs/{job}"' in text
    assert "process_resident_memory_bytes" in text
    service.stop()
    lines = [json.loads(line) for line in service.log().splitlines()]
    mine = [line for line in lines if line.get("request_id") == "my-request.1"]
    assert any(line.get("job_id") == job["id"] and line.get("status") == 202 for line in mine)
    assert any(line["message"] == "a job ended" and line["job_id"] == job["id"] for line in lines)
    assert service.token not in service.log()


def test_readiness_says_what_is_missing(fresh):
    service = fresh(ready=False, workers=0)
    with service.client() as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert not answer.json()["checks"]["workers"]["ok"]
        assert answer.json()["checks"]["database"]["ok"]
        assert client.get("/livez").status_code == 200


def test_what_expires_is_removed(fresh):
    service = fresh(upload_ttl=1, keep_ttl=8, sweep_seconds=0.5)
    with service.client() as client:
        client.post("/v1/uploads", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "10"})
        job = wait(client, submit(client, "compress", put(client, b"x" * 1000))["id"])
        until = time.monotonic() + 50
        while client.get("/v1/jobs").json() + client.get("/v1/uploads").json() and time.monotonic() < until:
            time.sleep(0.2)
        assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
    files = [
        path for kind in ("objects", "spool", "work") for path in (service.data / kind).rglob("*") if path.is_file()
    ]
    assert files == []


def test_quotas(fresh):
    service = fresh(ready=False, workers=0, token_quota="1MB", max_upload="2MB")
    tus = {"Tus-Resumable": "1.0.0"}
    with service.client() as client, service.client(service.add_token("second")) as other:
        assert client.post("/v1/uploads", headers=tus | {"Upload-Length": "3000000"}).status_code == 413
        over = client.post("/v1/uploads", headers=tus | {"Upload-Length": "1500000"})
        assert (over.status_code, over.json()["code"]) == (507, "storage.quota")
        kept = put(client, b"x" * 900_000)
        over = client.put("/v1/uploads/x", content=b"x" * 200_000)
        assert (over.status_code, over.json()["code"]) == (507, "storage.quota")
        assert other.put("/v1/uploads/x", content=b"x" * 200_000).status_code == 201
        assert client.delete(f"/v1/uploads/{kept}", headers=tus).status_code == 204
        put(client, b"x" * 900_000)


# Names


@given(st.text())
def test_no_name_is_a_path(text):
    shown, cleaned = display_name(text), clean_name(text)
    assert "/" not in shown
    assert "\0" not in shown
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,120}", cleaned)
    assert cleaned not in (".", "..")
    assert not cleaned.startswith(".")
    content_disposition(shown).encode("latin-1")


@given(st.text())
def test_a_member_path_stays_inside_or_is_refused(text):
    try:
        path = member_path(text)
    except HTTPProblem:
        return
    joined = os.path.normpath(os.path.join("/root", path))
    assert joined.startswith("/root/")
    assert joined == f"/root/{path}"


# Ranges


@given(st.text(alphabet="bytes=0123456789-, ", max_size=40), st.integers(1, 1000))
def test_ranges_are_inside_or_refused(field, size):
    try:
        found = parse_ranges(field, size)
    except HTTPProblem:
        return
    for start, length in found or ():
        assert 0 <= start < start + length <= size


# Fetching


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.169.254", "172.16.0.1", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe", "64:ff9b:1::1", "::", "fe80::1%eth0", "255.255.255.255",
    ],
)  # fmt: skip
def test_inner_addresses_are_not_public(address):
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_outer_addresses_are_public(address):
    assert fetch.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example/x", "https://b.example/x", "https://a.example:8443/x", "https://u:p@a.example/x", "file:///etc/passwd",
        "https://a.example.evil.example/", "https://[::1", "https://a.example/\r\nX: y", "https://a.example:99999/",
    ],
)  # fmt: skip
def test_only_plain_https_of_allowed_hosts_is_fetched(url):
    with pytest.raises(HTTPProblem):
        fetch.allowed_host_and_path(url, ["a.example"])
    assert fetch.allowed_host_and_path("https://a.example/x?y=1", ["a.example"]) == ("a.example", "/x?y=1")


def test_one_inner_address_among_outer_ones_is_enough_to_refuse(tmp_path):
    with pytest.raises(HTTPProblem, match="not public"):
        fetch.download(
            "https://a.example/x", tmp_path / "x", allowed=["a.example"], limit=10,
            resolver=lambda _: ["93.184.215.14", "127.0.0.1"],
        )  # fmt: skip


# Spool


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "sync", "back", "reopen", "garbage"]), st.binary(max_size=50)), max_size=30
    )
)
def test_a_spool_holds_exactly_what_was_acknowledged(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("spool") / "file"
    spool, durable, pending = Spool(path, 0, hashlib.sha256()), b"", b""
    for action, data in steps:
        if action == "write":
            spool.write(data)
            pending += data
        elif action == "sync":
            durable, pending = durable + pending, b""
            assert spool.sync() == len(durable)
        elif action == "back":
            spool.roll_back()
            pending = b""
        else:  # a crash: what was not acknowledged may be there, in part, or as anything else
            spool.close()
            if action == "garbage":
                with path.open("ab") as file:
                    file.write(data)
            spool, pending = Spool(path, len(durable), hashlib.sha256(durable)), b""
    spool.sync()
    durable += pending
    assert spool.digest.hexdigest() == hashlib.sha256(durable).hexdigest()
    spool.close()
    assert path.read_bytes() == durable


def test_a_spool_shorter_than_acknowledged_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(OSError, match="shorter") as caught:
        Spool(tmp_path / "file", 10, None)
    assert caught.value.errno == errno.EIO


# The table of operations against the real library


def test_the_table_of_operations_fits_the_library():
    import statecodec

    found = offers("statecodec")
    assert list(found) == list(OPERATIONS)
    assert found == OPERATIONS  # the library has every operation, option and second input of its own table
    assert set(found) <= set(statecodec.__all__)


def test_the_http_process_never_imports_torch():
    code = "import sys; import statecodec_server.app, statecodec_server.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
