"""The Python client and `statecodec remote`: whole, interrupted, damaged."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import httpx
import pytest
from service import Service

from statecodec.errors import CorruptFile, UsageError
from statecodec_client import Client, ServiceError, transfer

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


def test_an_unreachable_service_is_said_to_be_so(tmp_path, monkeypatch):
    with Client("http://127.0.0.1:9", patience=0.5) as client, pytest.raises(ServiceError) as caught:
        client.job("x")
    assert caught.value.code == "unreachable"
    monkeypatch.setattr(transfer, "FIRST", 0.5)  # where nobody ever answered, all the patience for cuts is not waited
    with Client("http://127.0.0.1:9", patience=3600) as client, pytest.raises(ServiceError, match="cannot be reached"):
        client.request("GET", "/v1/jobs")
    for wrong in ("localhost:8321", "nowhere", "", "ftp://host", "http://"):
        with pytest.raises(UsageError, match="no address of a service"):
            Client(wrong)


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

            monkeypatch.setattr("statecodec_client.transfer.CHUNK", 1 << 20)
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


@pytest.mark.parametrize(
    ("status", "sent", "error"), [(200, 1000, CorruptFile), (206, 0, ServiceError)], ids=["too much", "nothing"]
)
def test_a_service_that_sends_too_much_or_nothing_is_left(tmp_path, status, sent, error):
    def answer(request):
        return httpx.Response(status, content=iter([bytes(10)] * (sent // 10)))

    file = {"name": "small", "bytes": 100, "sha256": "0" * 64, "href": "/small"}
    with Client("http://service", patience=0.1) as client:
        client._connection._http = httpx.Client(base_url="http://service", transport=httpx.MockTransport(answer))
        with pytest.raises(error):
            client.download({"files": [file]}, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert all(part.stat().st_size <= 100 for part in tmp_path.iterdir())


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


def test_the_client_needs_nothing_of_the_service(tmp_path):
    """`pip install 'statecodec[remote]'`: a client where the service's packages are not installed, nor torch used."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in "fastapi starlette uvicorn dbos sqlalchemy pydantic obstore statecodec_server torch".split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from statecodec_client import Client, ServiceError
from statecodec.operations import OPERATIONS
with Client("http://127.0.0.1:9", "sct_x", patience=0.2) as client:
    try:
        client.job("x")
    except ServiceError as error:
        print(error.code, OPERATIONS["compress"].accepted({"preset": "small"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "unreachable {'preset': 'small'}\n", done.stderr


def test_remote_prints_what_the_local_verb_prints(real, tmp_path):
    import torch

    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(64, 64), "exp_avg_sq": torch.rand(64, 64)}}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}]
    optimizer = {"state": state, "param_groups": groups}
    torch.save({"model": {"w": torch.randn(64, 64)}, "optimizer": optimizer}, tmp_path / "ckpt.pt")

    def local(*arguments):
        command = [sys.executable, "-m", "statecodec_cli", *map(str, arguments)]
        env = {**os.environ}  # readline puts COLUMNS into the process's environment behind Python's back
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    made = cli(real, "compress", "ckpt.pt", "--preset", "small", "--no-strict", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "ckpt.pt" in made.stdout
    small = "ckpt.sc.safetensors"
    for verb, arguments, second in (("inspect", [small], []), ("verify", [small], []), ("diff", ["ckpt.pt"], [small])):
        here = local(verb, *arguments, *second)
        there = cli(real, verb, *arguments, *(["--other", *second] if second else []), cwd=tmp_path)
        assert there.returncode == here.returncode == 0, there.stderr
        assert there.stdout == here.stdout
    assert "SNR" in cli(real, "analyze", "ckpt.pt", "--cutoff", "0.5", cwd=tmp_path).stdout
    document = json.loads(cli(real, "inspect", small, "--json", cwd=tmp_path).stdout)
    assert document["report"]["bytes"] == (tmp_path / small).stat().st_size


def test_remote_convert(real, tmp_path):
    import torch

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    done = cli(real, "convert", "ckpt.pt", "--to", "foam(level=1)", "-o", "foam.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "foam.pt").stat().st_size < (tmp_path / "ckpt.pt").stat().st_size
    done = cli(real, "convert", "ckpt.pt", "--layout", "dcp", "-o", "folder", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "folder" / ".metadata").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["restore", "--preset", "small"], "restore has no option 'preset'"),
        (
            ["compress", "--max-update-error", "7"],
            "'--max-update-error': '7' is not a fraction of an optimizer step",
        ),
        (["compress", "--pack", "rar"], "pack: 'rar' is not a text"),
        (["compress", "--rule", "nonsense"], "rules: ['nonsense'] is not a list"),
        (["convert", "-o", "x.pt"], "convert needs to or layout"),
        (["convert", "--to", "foam"], "convert needs -o"),
        (["diff"], "diff needs --other"),
        (["inspect", "--other", "ckpt.pt"], "inspect takes one checkpoint"),
        (["inspect", "-o", "x"], "inspect makes no file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_uploaded(service, client, tmp_path, arguments, says):
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    before = client.get("/v1/uploads").json()
    done = cli(service, arguments[0], "ckpt.pt", *arguments[1:], cwd=tmp_path)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert client.get("/v1/uploads").json() == before
