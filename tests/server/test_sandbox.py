"""A conversion in which native code runs: what it cannot reach, and what the next job finds."""

import hashlib
import json
import platform
import shutil
import socket
import sys

import pytest
from service import Service, put, submit, wait

from statecodec_server import kernels as compiled
from statecodec_server import landlock, seccomp
from statecodec_server.settings import Settings

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")
needs_landlock = pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")


def digests(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, kernels):
    """The library with something hostile in it; the kernels in the folder of its data are copies of the library's."""
    data = tmp_path_factory.mktemp("hostile") / "data"
    library = compiled.prepare(Settings(backend="statecodec", kernels=kernels))
    shutil.copytree(library, compiled.folder(Settings(backend="hostile", data=data)))
    with Service(data, backend="hostile", kernels=None) as running:
        yield running


def checkpoint(path):
    import torch

    torch.manual_seed(0)
    state = {0: {"exp_avg": torch.randn(64, 64), "exp_avg_sq": torch.rand(64, 64)}}
    torch.save({"model": {"w": torch.randn(64, 64)}, "optimizer": {"state": state}}, path)
    return path.read_bytes()


@needs_landlock
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no seccomp filter for this machine")
def test_a_hostile_job_and_then_another(hostile, tmp_path):
    mark = tmp_path / "breached"
    token = hostile.add_token("neighbour")
    data = checkpoint(tmp_path / "ckpt.pt")
    kernels = next(path for path in (hostile.data / "kernels").iterdir() if path.is_dir())
    with hostile.client() as client, hostile.client(token) as neighbour, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        theirs = put(neighbour, b"their weights")
        objects = hostile.data / "objects" / "uploads"
        before = digests(kernels)
        assert [name for name in before if name.endswith(".nbi")]
        plan = {
            "mark": str(mark), "port": listener.getsockname()[1],
            "secrets": [str(path) for path in (
                objects / theirs / "0", hostile.data / "secret", hostile.data / "service.sqlite",
                hostile.data.parent / "data.log", "/etc/passwd", __file__,
            )],
        }  # fmt: skip
        bad = put(client, b"HOSTILE\n" + json.dumps(plan).encode())
        job = wait(client, submit(client, "compress", bad)["id"])
        assert job["state"] == "succeeded", job
        report = client.get(job["links"]["report"]).json()
        attempts = {name: found for name, found in report.items() if name not in ("tensors", "source")}
        readable = attempts["read"].pop()
        assert readable == "", "the library's own files can be read, or this test shows nothing"
        assert {name: found for name, found in attempts.items() if "" in found} == {}
        assert all(attempts.values()), "every attempt was made"
        assert digests(kernels) == before
        assert (objects / bad / "0").read_bytes().startswith(b"HOSTILE")
        assert (objects / theirs / "0").read_bytes() == b"their weights"

        good = wait(client, submit(client, "compress", put(client, data), options={"preset": "lossless"})["id"])
        assert good["state"] == "succeeded", good
        back = wait(client, submit(client, "restore", source={"job": good["id"]})["id"])
        assert client.get(back["links"]["result"]).content == data
        assert not mark.exists()
    walls = [json.loads(line) for line in hostile.log().splitlines() if "a conversion begins" in line]
    assert f"landlock {landlock.version()}" in walls[0]["walls"]
    assert "seccomp" in walls[0]["walls"]


def test_kernels_are_compiled_before_any_job_and_only_read_afterwards(real, kernels, tmp_path):
    mine = compiled.folder(Settings(backend="statecodec", kernels=kernels))
    before = digests(mine)
    assert [name for name in before if name.endswith(".nbi")]
    with real.client() as client:
        job = wait(client, submit(client, "compress", put(client, checkpoint(tmp_path / "ckpt.pt")))["id"])
        assert job["state"] == "succeeded", job
    assert digests(mine) == before
    assert not [path for path in (mine, *mine.rglob("*")) if path.stat().st_mode & 0o222]


def test_kernels_that_do_not_compile_are_a_log_line_and_not_the_end(fresh, tmp_path):
    place = tmp_path / "kernels"
    place.mkdir()
    broken = tmp_path / "broken.py"
    broken.write_text("from double import *\nfrom double import __all__\ndef convert(): pass\n")
    service = fresh(backend="broken", kernels=place, extra_path=tmp_path)
    with service.client() as client:
        assert wait(client, submit(client, "compress", put(client, b"x" * 1000))["id"])["state"] == "succeeded"
    assert "the kernels could not be compiled" in service.log()
    assert not list(place.glob("compiling-*"))


@needs_landlock
def test_the_hole_in_a_readable_folder(tmp_path):
    for name in ("lib", "data/objects", "data2"):
        (tmp_path / name).mkdir(parents=True)
    found = set(landlock.without(tmp_path, tmp_path / "data"))
    assert found == {tmp_path / "lib", tmp_path / "data2"}
    assert list(landlock.without(tmp_path / "lib", tmp_path / "data")) == [tmp_path / "lib"]
    assert list(landlock.without(tmp_path / "data", tmp_path / "data")) == []


def test_every_refused_call_has_its_number_once():
    for column in (0, 1):
        numbers = [pair[column] for pair in seccomp._REFUSED.values() if pair[column] is not None]
        assert len(numbers) == len(set(numbers))
