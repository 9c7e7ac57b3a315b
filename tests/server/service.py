"""A real service in processes of its own, for tests: started, killed, started again."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parent
PLAIN = {"verify": False}  # http on this machine: each client would read all certificates otherwise
KERNELS = None
"""A folder of compiled kernels for all services of a run of pytest; without it each service compiles its own."""


def free_port():
    """A port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """`statecodec-server` on a fixed port over one data folder."""

    def __init__(self, data, *, workers=1, backend="double", module="statecodec_server", extra_path=None, **settings):
        self.data, self.module = Path(data), module
        self.path = [str(HERE), *([str(extra_path)] if extra_path else [])]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        defaults = {
            "poll_seconds": 0.1,
            "lease_seconds": 3,
            "drain_seconds": 3,
            "disk_reserve": "1MB",
            "log_level": "INFO",
        }
        if KERNELS is not None:
            defaults["kernels"] = KERNELS
        self.settings = {**defaults, "workers": workers, "backend": backend, **settings}
        self.token = None
        self.process = None
        self.output = []

    def environment(self):
        """What the server's processes see; a setting that is None is not given."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("STATECODEC_SERVER_")}
        env |= {
            f"STATECODEC_SERVER_{name.upper()}": str(value)
            for name, value in self.settings.items()
            if value is not None
        }
        env["STATECODEC_SERVER_DATA"] = str(self.data)
        env["STATECODEC_SERVER_PORT"] = str(self.port)
        env["PYTHONPATH"] = os.pathsep.join([*self.path, env.get("PYTHONPATH", "")])
        return env

    def start(self, *, ready=True, timeout=200):
        """Start and wait until it answers (`ready`: until a worker is there as well)."""
        self.data.mkdir(parents=True, exist_ok=True)
        log = (self.data.parent / f"{self.data.name}.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module], env=self.environment(), stdout=subprocess.PIPE, stderr=log
        )
        log.close()
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        until = time.monotonic() + timeout
        path = "/readyz" if ready and self.settings["workers"] else "/livez"
        with httpx.Client(base_url=self.url, timeout=5, **PLAIN) as client:
            while time.monotonic() < until:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the service ended: {self.log()[-2000:]}")
                try:
                    if client.get(path).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.03)
            else:
                raise TimeoutError(self.log()[-3000:])
        while self.token is None and self.settings.get("auth", True):
            time.sleep(0.01)
        return self

    def _read(self, process):
        for line in process.stdout:
            text = line.decode()
            self.output.append(text)
            found = re.search(r"^token\s+(sct_\S+)", text)
            if found:
                self.token = found[1]
        process.stdout.close()

    def kill(self):
        """kill -9, and wait until its workers have noticed."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout=30):
        """SIGTERM; the exit status."""
        if self.process is None or self.process.poll() is not None:
            return None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def log(self):
        """Everything it logged."""
        return (self.data.parent / f"{self.data.name}.log").read_text()

    def client(self, token=None, **options):
        """An httpx client with a token."""
        headers = {"Authorization": f"Bearer {token or self.token}"} if (token or self.token) else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **PLAIN | options)

    def add_token(self, name):
        """A further token: what `token add NAME` does, without starting a process for it."""
        from statecodec_server.database import Database
        from statecodec_server.settings import Settings
        from statecodec_server.tokens import Tokens

        place = Settings(data=self.data, database_url=self.settings.get("database_url"))
        database = Database(place.database, pool_size=1)
        try:
            return Tokens(database, b"").create(name)
        finally:
            database.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


def put(client, data, name="ckpt.pt"):
    """Upload bytes in one go; the upload's id."""
    answer = client.put(f"/v1/uploads/{name}", content=data)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def submit(client, operation, upload=None, key=None, **fields):
    """Submit a job; its document."""
    body = {"operation": operation, **({"upload": upload} if upload else {}), **fields}
    answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key} if key else {})
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


def wait(client, job, timeout=60):
    """Poll until the job has ended; its document."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        answer = client.get(f"/v1/jobs/{job}")
        assert answer.status_code == 200, answer.text
        if answer.json()["state"] in ("succeeded", "failed", "cancelled"):
            return answer.json()
        time.sleep(0.05)
    raise TimeoutError(answer.text)
