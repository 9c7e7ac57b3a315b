"""The Python client and `statecodec remote`: whole, interrupted, damaged."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from service import Service

from statecodec.errors import CorruptFile
from statecodec_server.client import Client, ServiceError

DATA = os.urandom(1_000_000) * 6


@pytest.fixture
def remote(service, tmp_path):
    """A client of the shared service with a cache of its own."""
    with Client(service.url, service.token, patience=20, cache=tmp_path / "cache") as found:
        yield found


def test_run_and_download(remote, tmp_path):
    source, target, seen = tmp_path / "ckpt.pt", tmp_path / "small", []
    source.write_bytes(DATA)
    job = remote.run("compress", source, options={"preset": "small"}, progress=lambda *step: seen.append(step))
    assert remote.download(job, target) == [target]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == job["files"][0]["sha256"]
    assert {"uploading", "checking"} <= {stage for _, _, stage in seen}
    assert remote.report(job)["source"]["name"] == "ckpt.pt"
    remote.delete(job)
    with pytest.raises(ServiceError) as caught:
        remote.job(job["id"])
    assert (caught.value.code, caught.value.status) == ("not_found", 404)


def test_a_directory(remote, tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "deep").mkdir(parents=True)
    for name in ("optimizer.pt", "deep/rng.pt"):
        (folder / name).write_bytes(name.encode() * 1000)
    job = remote.run("compress", folder)
    written = remote.download(job, tmp_path / "out")
    assert len(written) == 2
    assert all(path.is_relative_to(tmp_path / "out") for path in written)


def test_a_failed_job_carries_its_code(remote, tmp_path):
    source = tmp_path / "bad.pt"
    source.write_bytes(b"BEHAVE refuse\n")
    with pytest.raises(ServiceError) as caught:
        remote.run("compress", source)
    assert caught.value.code == "layout.malformed"


def test_a_wrong_token_is_not_tried_again(service, tmp_path):
    source = tmp_path / "x.pt"
    source.write_bytes(b"x")
    began = time.monotonic()
    with Client(service.url, "sct_no", patience=60) as client, pytest.raises(ServiceError) as caught:
        client.run("inspect", source)
    assert caught.value.code == "auth.invalid"
    assert time.monotonic() - began < 10


def test_an_unreachable_service_is_said_to_be_so(tmp_path):
    with Client("http://127.0.0.1:9", patience=0.5) as client, pytest.raises(ServiceError) as caught:
        client.job("x")
    assert caught.value.code == "unreachable"


def test_an_upload_survives_the_death_of_the_server_and_of_the_client(tmp_path, monkeypatch):
    service = Service(tmp_path / "data", workers=0).start(ready=False)
    source = tmp_path / "ckpt.pt"
    source.write_bytes(DATA)
    killed = []

    def kill_half_way(done, total, stage):
        if stage == "uploading" and done > total / 2 and not killed:
            killed.append(done)
            service.kill()
            threading.Thread(target=service.start, kwargs={"ready": False}).start()

    try:
        with Client(service.url, service.token, patience=60, cache=tmp_path / "cache") as client:
            identity = client.upload(source, progress=kill_half_way)
            assert killed
            assert client.request("GET", f"/v1/uploads/{identity}").json()["sha256"] == hashlib.sha256(DATA).hexdigest()

            def stop_half_way(done, total, stage):
                if done > total / 2:
                    raise KeyboardInterrupt

            monkeypatch.setattr("statecodec_server._transfer.CHUNK", 1 << 20)
            with pytest.raises(KeyboardInterrupt):
                client.upload(source, progress=stop_half_way)
            starts = []
            second = client.upload(source, progress=lambda done, _, stage: starts.append((stage, done)))
            assert starts[0][0] == "uploading"
            assert starts[0][1] > 0
            assert second != identity
            assert len(client.request("GET", "/v1/uploads").json()) == 2
    finally:
        service.stop()


def test_a_download_goes_on_and_a_damaged_one_is_refused(remote, tmp_path):
    source, target = tmp_path / "ckpt.pt", tmp_path / "small"
    source.write_bytes(DATA)
    job = remote.run("compress", source)
    remote.download(job, target)
    content = target.read_bytes()
    part = tmp_path / f".small.{job['files'][0]['sha256'][:16]}.part"
    target.unlink()
    part.write_bytes(content[: len(content) // 2])
    seen = []
    remote.download(job, target, progress=lambda done, *_: seen.append(done))
    assert target.read_bytes() == content
    assert seen[0] > len(content) // 2
    target.unlink()
    part.write_bytes(bytes(len(content) // 2))
    with pytest.raises(CorruptFile):
        remote.download(job, target)
    assert not target.exists()
    assert not part.exists()


def cli(service, *arguments, cwd):
    env = {
        **os.environ,
        "STATECODEC_TOKEN": service.token,
        "STATECODEC_SERVER": service.url,
        "XDG_CACHE_HOME": str(cwd),
    }
    command = [sys.executable, "-m", "statecodec_cli", "remote", *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line(service, client, tmp_path):
    source = tmp_path / "ckpt.pt"
    source.write_bytes(DATA)
    before = (len(client.get("/v1/jobs").json()), len(client.get("/v1/uploads").json()))
    done = cli(service, "compress", source, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    small = tmp_path / "ckpt.sc.safetensors"
    assert document["files"] == [str(small)]
    assert hashlib.sha256(small.read_bytes()).hexdigest() == document["job"]["files"][0]["sha256"]
    assert (
        len(client.get("/v1/jobs").json()),
        len(client.get("/v1/uploads").json()),
    ) == before  # nothing is left there
    again = cli(service, "compress", source, cwd=tmp_path)
    assert (again.returncode, "output.exists" in again.stderr) == (1, True)
    back = cli(service, "restore", small, "-o", tmp_path / "back.pt", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back.pt").read_bytes() == DATA
    source.write_bytes(b"BEHAVE refuse\n")
    refused = cli(service, "inspect", small, "--token", "sct_wrong", cwd=tmp_path)
    assert (refused.returncode, "auth.invalid" in refused.stderr) == (1, True)
