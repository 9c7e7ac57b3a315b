"""Processes that stay up and run functions together, as gloo process groups of any size."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forks import forks

PATIENCE = 300  # seconds, of a collective and then of the caller: only against waiting for ever


class Ranks:
    """`run(n, function, *args)` calls the function, which must be importable, on n ranks of a new process group.

    Processes are started when they are first needed, and anew after a failure: then others may wait for a collective.
    """

    def __init__(self) -> None:
        self._context = forks()
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        self._stack_files: list[Any] = []

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned, by rank. Raises AssertionError with the traceback of a rank that failed."""
        while len(self._processes) < n:
            self._start()
        results: dict[int, Any] = {}
        try:
            self._collect(n, function, args, results)
        except BaseException as error:
            if not isinstance(error, AssertionError):  # the test was ended from outside
                print(self._stacks(set(range(n)) - results.keys()), file=sys.stderr)
            self.stop()  # or the next test would get the answers to this one
            raise
        return [results[rank] for rank in range(n)]

    def _collect(self, n: int, function: Callable[..., Any], args: tuple[Any, ...], results: dict[int, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(n):
                self._ends[rank].send((function, args, rank, n, str(Path(folder) / "store")))
            while len(results) < n:
                silent = set(range(n)) - results.keys()
                ready = wait([self._ends[r] for r in silent], 2 * PATIENCE)
                if not ready:
                    raise AssertionError(f"ranks {sorted(silent)} of {n} did not answer; {self._stacks(silent)}")
                for end in ready:
                    rank = self._ends.index(end)  # type: ignore[arg-type]
                    try:
                        failure, result = end.recv()  # type: ignore[union-attr]
                    except EOFError:
                        failure, result = "the process died", None
                    if failure:
                        raise AssertionError(f"rank {rank} of {n}: {failure}")
                    results[rank] = result

    def _stacks(self, ranks: set[int]) -> str:
        """What each rank is doing now: every one writes it into its file when it gets the signal."""
        said = []
        for rank in sorted(ranks):
            self._stack_files[rank].truncate(0)
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            for _ in range(100):
                self._stack_files[rank].seek(0)
                if " in <module>\n" in (text := self._stack_files[rank].read()):  # the last line of the main thread
                    break
                time.sleep(0.1)
            said.append(f"rank {rank}:\n{text}")
        return "\n".join(said)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._ends, self._stack_files = [], [], []

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        stack = tempfile.NamedTemporaryFile("w+", suffix=".txt")  # noqa: SIM115
        process = self._context.Process(target=_serve, args=(theirs, stack.name), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        self._ends.append(ours)
        self._stack_files.append(stack)


def _serve(end: Connection, stack: str) -> None:
    faulthandler.register(signal.SIGUSR1, open(stack, "a"))  # noqa: SIM115
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported; no rank has a GPU
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        try:
            function, args, rank, n, store = end.recv()
        except EOFError:
            return
        try:
            patience = timedelta(seconds=PATIENCE)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=patience)
            result = function(*args)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            end.send((traceback.format_exc(), None))
            return
        end.send(("", result))
