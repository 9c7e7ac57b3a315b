"""A hypothesis state machine over uploads and jobs: whatever the order of requests, the service agrees with a model."""

import base64
import hashlib
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from service import wait

TUS = {"Tus-Resumable": "1.0.0"}
BODY = TUS | {"Content-Type": "application/offset+octet-stream"}
SMALL = st.binary(max_size=300)


class Model:
    """What an upload must look like."""

    def __init__(self, path, length):
        self.path, self.length, self.data, self.gone = path, length, b"", False

    @property
    def complete(self):
        return len(self.data) == self.length


class Protocol(RuleBasedStateMachine):
    """Uploads and jobs of one token."""

    client = None  # set by the test
    uploads = Bundle("uploads")
    jobs = Bundle("jobs")

    def __init__(self):
        super().__init__()
        self.known, self.keys, self.made = [], {}, {}

    @rule(target=uploads, length=st.integers(0, 600))
    def create(self, length):
        answer = self.client.post("/v1/uploads", headers=TUS | {"Upload-Length": str(length)})
        assert answer.status_code == 201
        model = Model(answer.headers["Location"].split("/", 3)[3], length)
        model.path = "/" + model.path
        self.known.append(model)
        return model

    @rule(target=uploads, data=SMALL, extra=st.integers(0, 50))
    def create_with_body(self, data, extra):
        length = len(data) + extra
        answer = self.client.post("/v1/uploads", content=data, headers=BODY | {"Upload-Length": str(length)})
        assert answer.status_code == 201
        assert answer.headers["Upload-Offset"] == str(len(data))
        model = Model("/" + answer.headers["Location"].split("/", 3)[3], length)
        model.data = data
        self.known.append(model)
        return model

    @rule(target=uploads, data=SMALL)
    def put(self, data):
        answer = self.client.put("/v1/uploads/x.pt", content=data)
        assert answer.status_code == 201
        model = Model(answer.headers["Location"], len(data))
        model.data = data
        self.known.append(model)
        return model

    @rule(
        upload=uploads,
        data=SMALL,
        shift=st.sampled_from([0, 0, 0, 0, 1, -1]),
        check=st.sampled_from(["", "right", "wrong"]),
    )
    def patch(self, upload, data, shift, check):
        offset = max(0, len(upload.data) + shift)
        headers = BODY | {"Upload-Offset": str(offset)}
        if check:
            digest = hashlib.sha1(data if check == "right" else data + b"x").digest()
            headers["Upload-Checksum"] = f"sha1 {base64.b64encode(digest).decode()}"
        answer = self.client.patch(upload.path, content=data, headers=headers)
        if upload.gone:
            assert answer.status_code == 404
        elif offset + len(data) > upload.length:
            assert answer.status_code in (400, 409)
        elif offset != len(upload.data) or upload.complete:
            assert answer.status_code == 409
        elif check == "wrong":
            assert answer.status_code == 460
        else:
            assert answer.status_code == 204
            upload.data += data
            assert answer.headers["Upload-Offset"] == str(len(upload.data))

    @rule(upload=uploads)
    def head(self, upload):
        answer = self.client.head(upload.path, headers=TUS)
        if upload.gone:
            assert answer.status_code == 404
            return
        assert answer.headers["Upload-Offset"] == str(len(upload.data))
        assert answer.headers["Upload-Length"] == str(upload.length)

    @rule(upload=uploads)
    def show(self, upload):
        answer = self.client.get(upload.path)
        if upload.gone:
            assert answer.status_code == 404
            return
        assert answer.json()["state"] == ("ready" if upload.complete else "receiving")
        if upload.complete:
            assert answer.json()["sha256"] == hashlib.sha256(upload.data).hexdigest()

    @rule(upload=uploads)
    def terminate(self, upload):
        answer = self.client.delete(upload.path, headers=TUS)
        assert answer.status_code == (404 if upload.gone else 204)
        upload.gone = True

    @rule(
        target=jobs,
        upload=uploads,
        key=st.sampled_from([None, None, "a", "b", "c"]),
        operation=st.sampled_from(["inspect", "compress"]),
    )
    def submit(self, upload, key, operation):
        body = {"operation": operation, "upload": upload.path.rsplit("/", 1)[-1]}
        full = None if key is None else f"{id(self)}-{key}"
        answer = self.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": full} if full else {})
        if full in self.keys:
            first, job = self.keys[full]
            if first != body:
                assert answer.status_code == 422
                return multiple()
            assert answer.status_code == 200
            assert answer.json()["id"] == job
            return multiple()
        if upload.gone:
            assert answer.status_code == 404
            return multiple()
        if not upload.complete:
            assert answer.status_code == 409
            return multiple()
        assert answer.status_code == 202
        job = answer.json()["id"]
        if full is not None:
            self.keys[full] = (body, job)
        self.made[job] = operation
        return job

    @rule(job=jobs)
    def cancel(self, job):
        assert self.client.post(f"/v1/jobs/{job}/cancel").status_code in (202, 404, 409)

    @rule(job=consumes(jobs))
    def finish_and_delete(self, job):
        document = wait(self.client, job, 60)
        # The input may have been removed while the job waited for its turn.
        assert document["state"] in ("succeeded", "cancelled") or document["error"]["code"] in (
            "job.input",
            "storage.failed",
        )
        if document["state"] == "succeeded" and self.made[job] == "compress":
            content = self.client.get(document["links"]["result"])
            assert hashlib.sha256(content.content).hexdigest() == document["files"][0]["sha256"]
        assert self.client.delete(f"/v1/jobs/{job}").status_code == 204
        assert self.client.get(f"/v1/jobs/{job}").status_code == 404
        self.keys = {key: value for key, value in self.keys.items() if value[1] != job}

    @invariant()
    def listed_uploads_are_those_that_were_not_removed(self):
        listed = {item["id"] for item in self.client.get("/v1/uploads").json()}
        for upload in self.known:
            if len(self.known) < 100:
                assert (upload.path.rsplit("/", 1)[-1] in listed) is not upload.gone

    def teardown(self):
        for job in self.made:
            if self.client.get(f"/v1/jobs/{job}").status_code == 200:
                self.client.post(f"/v1/jobs/{job}/cancel")
                wait(self.client, job)
                self.client.delete(f"/v1/jobs/{job}")
        for upload in self.known:
            if not upload.gone:
                self.client.delete(upload.path, headers=TUS)


@pytest.mark.slow
def test_the_protocol(service):
    token = service.add_token("machine")
    with service.client(token) as client:
        machine = type("Bound", (Protocol,), {"client": client})
        examples = int(os.environ.get("STATECODEC_MACHINE_RUNS", "8"))
        options = settings(max_examples=examples, stateful_step_count=20, suppress_health_check=list(HealthCheck))
        run_state_machine_as_test(machine, settings=options)
