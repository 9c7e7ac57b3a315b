"""Stands in for commands of the documents that would install, build or run for too long: `stand_in.py NAME ARGS...`.

What it can check it does: make targets exist, extras exist and are named as no index needs, options are understood,
examples run for two steps, a service starts and stops. `statecodec` and examples are the real ones, warm (see warm.py).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from warm import call  # beside this file

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main(name: str, *words: str) -> int:
    """Check one call; its exit code."""
    if name == "make":
        return subprocess.call(["/usr/bin/env", "-u", "MAKEFLAGS", _real_make(), "-n", "-C", str(ROOT), *words])
    if name == "pip":
        return _pip(*words)
    if name == "python":
        return _python(*words)
    if name == "statecodec" and words[:1] in (("serve",), ("worker",)):
        return _serve(str(BIN / name), *words)
    if name == "statecodec-server" and words[:1] != ("token",):
        return _serve(str(BIN / name), *words)
    if name == "statecodec":
        return call(os.environ["WARM"], words)
    return subprocess.call([str(BIN / name), *words])


def _real_make() -> str:
    here = str(Path(os.environ["STAND_INS"]))
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != here]
    return next(str(Path(f) / "make") for f in folders if (Path(f) / "make").exists())


def _pip(verb: str, *words: str) -> int:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for word in words:
        match = re.fullmatch(r"-e|\.(?:\[([\w,]+)\])?", word)
        if verb != "install" or match is None or not set((match[1] or "").split(",")) - {""} <= extras:
            print(f"pip {verb} {word}: not this checkout, or an extra that it does not have", file=sys.stderr)
            return 1
    return 0


def _python(script: str, *words: str) -> int:
    path = ROOT / script
    if script.startswith("examples/"):
        return call(os.environ["WARM"], [*words, "--steps", "2"], str(path)) if path.is_file() else 1
    return 0 if path.is_file() else 1


def _serve(*command: str) -> int:
    """Start it on a free port, wait until it answers, stop it; of one that needs another machine check the options."""
    if any("://" in word for word in command):
        return subprocess.call([*command, "--help"], stdout=subprocess.DEVNULL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--data", "data-of-the-stand-in", "--workers", "0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STATECODEC_SERVER_")}
    process = subprocess.Popen([*command, *options], env=environment)
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez"):
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
