"""Programs without their start: forked from a process that has imported torch, with the caller's streams.

    python warm.py SOCKET     serves calls until it is killed; says "ready" when it can

`call(SOCKET, words)` runs one command line of `statecodec` in the caller's folder and environment, or one of a Python
script, and gives its exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence

STREAMS = (0, 1, 2)


def call(path: str, words: Sequence[str], script: str | None = None) -> int:
    """Run `statecodec WORDS`, or `python SCRIPT WORDS`, there."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"!"], STREAMS)
        request = {"words": words, "script": script, "folder": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1)
    return answer[0] if answer else 1


def serve(path: str) -> None:
    import numba  # noqa: F401
    import torch  # noqa: F401

    import statecodec.verbs  # noqa: F401
    from statecodec_cli.main import main

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.sendall(bytes([_run(main, connection)]))
    os._exit(0)


def _run(main: Callable[[], int], connection: socket.socket) -> int:
    _, streams, *_ = socket.recv_fds(connection, 1, len(STREAMS))
    with connection.makefile("rb") as file:
        request = json.load(file)
    for ours, theirs in zip(STREAMS, streams, strict=True):
        os.dup2(theirs, ours)
        os.close(theirs)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "w" if i else "r", closefd=False) for i in STREAMS)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [request["script"] or "statecodec", *request["words"]]
    code: object = 1
    try:
        if request["script"]:
            sys.path.insert(0, os.path.dirname(request["script"]))
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        else:
            code = main()
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
