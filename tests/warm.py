"""`statecodec` without its start: forked from a process that has imported torch, with the caller's streams.

    python warm.py SOCKET     serves calls until it is killed; says "ready" when it can

`call(SOCKET, words)` runs one command line in the caller's folder and environment, and gives its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

STREAMS = (0, 1, 2)


def call(path: str, words: Sequence[str]) -> int:
    """Run `statecodec WORDS` there."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"!"], STREAMS)
        request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
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


def _run(main: object, connection: socket.socket) -> int:
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
    sys.argv = ["statecodec", *request["words"]]
    code = main()  # type: ignore[operator]
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


if __name__ == "__main__":
    serve(sys.argv[1])
