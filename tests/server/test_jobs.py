"""Jobs against a real server and worker: each operation, once per key, cancelled, crashed, confined."""

import json
import socket
import threading
import time

import httpx
import pytest
from service import Service, put, submit, wait

DATA = b"state " * 50_000


def run(client, operation, data=DATA, **fields):
    return wait(client, submit(client, operation, put(client, data), **fields)["id"])


def test_every_offered_operation_is_the_librarys_own(client):
    offered = {item["name"]: item for item in client.get("/v1/operations").json()}
    assert list(offered) == ["compress", "restore", "inspect", "verify", "diff"]
    assert "max_update_error" not in offered["compress"]["options"]["properties"]  # the double does not take it
    assert offered["compress"]["options"]["properties"]["preset"]["default"] == "resume"


def test_compress_then_restore_gives_the_bytes_back(client):
    small = run(client, "compress", options={"preset": "small"})
    assert (small["state"], small["bytes_in"], small["options"]) == ("succeeded", len(DATA), {"preset": "small"})
    assert small["files"][0]["name"] == "ckpt.sc.safetensors"
    verified = wait(client, submit(client, "verify", source={"job": small["id"]})["id"])
    assert verified["state"] == "succeeded"
    assert verified["files"] == []
    back = wait(client, submit(client, "restore", source={"job": small["id"]})["id"])
    assert back["files"][0]["name"] == "original.pt"  # the name the file itself carries
    assert client.get(f"/v1/jobs/{back['id']}/result").content == DATA


def test_diff_takes_two_inputs(client):
    one = put(client, DATA)
    same = wait(client, submit(client, "diff", one, other={"upload": put(client, DATA)})["id"])
    assert client.get(same["links"]["report"]).json()["total"] == {"same": True}
    other = wait(client, submit(client, "diff", one, other={"upload": put(client, b"else")})["id"])
    assert client.get(other["links"]["report"]).json()["total"] == {"same": False}
    refused = client.post("/v1/jobs", json={"operation": "diff", "upload": one})
    assert (refused.status_code, refused.json()["code"]) == (422, "usage")


def test_a_directory_checkpoint_keeps_its_names(client):
    members = [
        {"upload": put(client, b"a" * 1000), "path": "run-1/optimizer.pt"},
        {"upload": put(client, b"b" * 2000), "path": "run-1/shards/__0_0.distcp"},
        {"upload": put(client, b"c" * 10), "path": "run-1/.metadata"},
    ]
    seen = wait(client, submit(client, "inspect", source={"uploads": members})["id"])
    report = client.get(seen["links"]["report"]).json()
    assert sorted(report["names"]) == [".metadata", "optimizer.pt", "shards/__0_0.distcp"]
    assert (seen["name"], seen["bytes_in"]) == ("run-1", 3010)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "a/../b",
        "a//b",
        "a/./b",
        "a\\b",
        "",
        "a\0b",
        "-",
        "a" * 300,
        " x",
        "x ",
        "caf\u00e9",
        "a/" * 20 + "b",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(client, path):
    body = {"operation": "inspect", "source": {"uploads": [{"upload": put(client, b"x"), "path": path}]}}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == (202 if path == "-" else 422), answer.text


def test_two_files_cannot_have_one_place(client):
    one = put(client, b"x")
    for paths in (("a", "a"), ("a", "a/b")):
        source = {"uploads": [{"upload": one, "path": path} for path in paths]}
        assert client.post("/v1/jobs", json={"operation": "inspect", "source": source}).status_code == 422


def test_a_repeated_key_finds_its_job(client):
    upload = put(client, DATA)
    first = submit(client, "compress", upload, key="once-1")
    again = client.post(
        "/v1/jobs", json={"operation": "compress", "upload": upload}, headers={"Idempotency-Key": "once-1"}
    )
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    other = client.post(
        "/v1/jobs", json={"operation": "inspect", "upload": upload}, headers={"Idempotency-Key": "once-1"}
    )
    assert (other.status_code, other.json()["code"]) == (422, "job.key_reused")
    wait(client, first["id"])
    client.delete(f"/v1/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"})
    late = client.post(
        "/v1/jobs", json={"operation": "compress", "upload": upload}, headers={"Idempotency-Key": "once-1"}
    )
    assert (late.status_code, late.json()["id"], late.json()["state"]) == (200, first["id"], "succeeded")


def test_simultaneous_duplicates_make_one_job(service, client):
    upload = put(client, DATA)
    found = []

    def post():
        with service.client() as mine:
            found.append(submit(mine, "compress", upload, key="storm")["id"])

    threads = [threading.Thread(target=post) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len(set(found)) == 1
    assert wait(client, found[0])["attempt"] == 1


def test_the_librarys_refusal_is_the_jobs_error(client):
    job = run(client, "compress", b"BEHAVE refuse\n")
    assert (job["state"], job["error"]["code"]) == ("failed", "layout.malformed")
    assert "ckpt.pt is truncated" in job["error"]["message"]
    assert "/" not in job["error"]["message"]  # no path of the server, nor of the job's folder


def test_a_crash_is_tried_again(fresh):
    service = fresh(job_attempts=100)
    with service.client() as client:
        job = submit(client, "compress", put(client, b"BEHAVE crash-until calm\n" + DATA))
        end = time.monotonic() + 60
        while "a conversion crashed and is tried again" not in service.log() and time.monotonic() < end:
            time.sleep(0.05)
        (service.data / "work" / job["id"] / "input" / "calm").touch()
        assert wait(client, job["id"])["state"] == "succeeded"


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A service with tight limits."""
    data = tmp_path_factory.mktemp("strict") / "data"
    with Service(data, job_memory="150MB", job_attempts=2, job_seconds=10, max_jobs=2) as running:
        yield running


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("crash", "job.crashed"),
        ("memory", "job.memory"),
        ("bug", "internal"),
        ("full", "storage.full"),
        ("hang", "job.timeout"),
    ],
)
def test_a_conversion_that_dies_is_a_failed_job_and_nothing_more(strict, behaviour, code):
    with strict.client() as client:
        job = run(client, "compress", f"BEHAVE {behaviour}\n".encode() + DATA)
        assert (job["state"], job["error"]["code"]) == ("failed", code), job
        left = [strict.data / "work" / job["id"], strict.data / "objects" / "results" / job["id"]]
        until = time.monotonic() + 10  # the end is visible first, then the space is freed
        while any(path.exists() for path in left) and time.monotonic() < until:
            time.sleep(0.05)
        assert not [path for path in left if path.exists()]
        assert run(client, "compress")["state"] == "succeeded"
        assert client.get("/readyz").status_code == 200


def test_unfinished_jobs_are_limited(strict):
    with strict.client() as client:
        slow = put(client, b"BEHAVE slow 200\n")
        jobs = [submit(client, "compress", slow)["id"] for _ in range(2)]
        answer = client.post("/v1/jobs", json={"operation": "compress", "upload": slow})
        assert (answer.status_code, answer.json()["code"]) == (429, "job.limit")
        for job in jobs:
            client.post(f"/v1/jobs/{job}/cancel")
            wait(client, job)


def test_a_conversion_cannot_reach_out(client, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.1)
        outside = tmp_path / "escaped"
        for behaviour in (f"network {listener.getsockname()[1]}", f"escape {outside}", "pickle", "shell", "kill"):
            job = run(client, "compress", f"BEHAVE {behaviour}\n".encode())
            assert job["state"] == "failed", behaviour
            assert "may not do this" in job["error"]["message"], job
        assert not outside.exists()
        with pytest.raises(TimeoutError):
            listener.accept()


def test_cancelling_ends_a_running_job_and_frees_its_folder(service, client):
    job = submit(client, "compress", put(client, b"BEHAVE slow 400\n" + DATA))
    until = time.monotonic() + 30
    while client.get(f"/v1/jobs/{job['id']}").json()["progress"]["stage"] != "encoding" and time.monotonic() < until:
        time.sleep(0.05)
    busy = client.delete(f"/v1/jobs/{job['id']}")
    assert (busy.status_code, busy.json()["code"]) == (409, "job.conflict")
    ended = wait(client, job["id"], 20)
    assert (ended["state"], ended["files"]) == ("cancelled", [])
    assert client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 409
    until = time.monotonic() + 5
    while (service.data / "work" / job["id"]).exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not (service.data / "work" / job["id"]).exists()
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_a_queued_job_is_cancelled_at_once(client):
    slow = submit(client, "compress", put(client, b"BEHAVE slow 60\n"))
    queued = submit(client, "compress", put(client, DATA))
    assert client.post(f"/v1/jobs/{queued['id']}/cancel").json()["state"] == "cancelled"
    client.post(f"/v1/jobs/{slow['id']}/cancel")
    assert wait(client, slow["id"])["state"] == "cancelled"
    assert run(client, "inspect")["state"] == "succeeded"


def test_events_tell_the_story_and_end(client):
    job = submit(client, "compress", put(client, b"BEHAVE slow 30\n" + DATA))
    events = []
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                events.append([line[7:]])
            elif line.startswith("data: "):
                events[-1].append(json.loads(line[6:]))
    assert [kind for kind, _ in events[:-1]] == ["progress"] * (len(events) - 1)
    assert events[-1][0] == "end"
    assert events[-1][1]["state"] == "succeeded"
    done = [document["progress"]["done"] for _, document in events if document["progress"]["stage"] == "encoding"]
    assert len(set(done)) > 2


def test_what_does_not_exist_is_refused(client):
    for body in (
        {"operation": "explode", "upload": "0" * 26},
        {"operation": "compress"},
        {"operation": "compress", "upload": "0" * 26, "source": {"upload": "0" * 26}},
        {"operation": "compress", "source": {"upload": "0" * 26, "job": "0" * 26}},
        {"operation": "compress", "source": {"bucket": "lab"}},
        {"operation": "compress", "source": {"url": "https://example.org/x.pt"}},
    ):
        assert client.post("/v1/jobs", json=body).status_code == 422, body
    for source in ({"upload": "0" * 26}, {"job": "0" * 26}, {"bucket": "lab", "key": "x"}):
        assert client.post("/v1/jobs", json={"operation": "compress", "source": source}).status_code == 404
    upload = put(client, DATA)
    for options in ({"preset": "huge"}, {"colour": 1}, {"max_update_error": 0.1}, {"pack": "zip"}):
        answer = client.post("/v1/jobs", json={"operation": "compress", "upload": upload, "options": options})
        assert (answer.status_code, answer.json()["code"]) == (422, "usage"), options
    large = client.post("/v1/jobs", content=b"{" + b" " * (2 << 20), headers={"Content-Type": "application/json"})
    assert (large.status_code, large.json()["code"]) == (413, "body.size")
    parts = (b"[" + b" " * 65536 for _ in range(40))
    large = client.post("/v1/jobs", content=parts, headers={"Content-Type": "application/json"})
    assert (large.status_code, large.json()["code"]) == (413, "body.size")


def test_an_unfinished_upload_is_no_input(client):
    created = client.post("/v1/uploads", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "10"})
    identity = httpx.URL(created.headers["Location"]).path.rsplit("/", 1)[-1]
    answer = client.post("/v1/jobs", json={"operation": "compress", "upload": identity})
    assert (answer.status_code, answer.json()["code"]) == (409, "upload.incomplete")


def test_the_real_library_works_inside_the_sandbox(real, tmp_path):
    """Everything the page and the client do, with nothing left over: folders, chains, restore."""
    import torch

    file = tmp_path / "ckpt.pt"
    torch.save({"optimizer": {"state": {0: {"exp_avg": torch.randn(64, 64), "exp_avg_sq": torch.rand(64, 64)}}}}, file)
    data = file.read_bytes()
    with real.client() as client:
        upload = put(client, data)
        first = wait(client, submit(client, "compress", upload, options={"preset": "lossless"})["id"])
        assert first["state"] == "succeeded", first
        base = {"job": first["id"]}
        chained = wait(client, submit(client, "compress", upload, options={"preset": "lossless"}, other=base)["id"])
        assert chained["state"] == "succeeded", chained["error"]
        assert [name["name"] for name in chained["files"]] == ["ckpt.next.sc.safetensors"], chained
        back = wait(client, submit(client, "restore", source={"job": chained["id"]}, other=base)["id"])
        assert [name["name"] for name in back["files"]] == ["ckpt.pt"], back
        assert client.get(back["links"]["result"]).content == data
        members = [{"upload": upload, "path": f"run/{name}"} for name in ("a.pt", "b.pt")]
        both = wait(client, submit(client, "compress", source={"uploads": members})["id"])
        back = wait(client, submit(client, "restore", source={"job": both["id"]})["id"])
        assert [name["name"] for name in back["files"]] == ["run/a.pt", "run/b.pt"], back["error"]
        report = client.get(both["links"]["report"]).json()
        assert [(found["file"], found["can_run_code"]) for found in report["pickles"]] == [
            ("a.pt", [])
        ]  # b is its link
