"""Processes that stay up and run functions together, as gloo process groups of any size."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PATIENCE = 300  # seconds, of a collective and then of the caller: only against waiting for ever


class Ranks:
    """`run(n, function, *args)` calls the function, which must be importable, on n ranks of a new process group.

    Processes are started when they are first needed, and anew after a failure: then others may wait for a collective.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned, by rank. Raises AssertionError with the traceback of a rank that failed."""
        while len(self._processes) < n:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(n):
                self._ends[rank].send((function, args, rank, n, str(Path(folder) / "store")))
            results: dict[int, Any] = {}
            while len(results) < n:
                ready = wait([self._ends[r] for r in range(n) if r not in results], 2 * PATIENCE)
                for end in ready:
                    rank = self._ends.index(end)  # type: ignore[arg-type]
                    try:
                        failure, results[rank] = end.recv()  # type: ignore[union-attr]
                    except EOFError:
                        failure = "the process died"
                    if failure:
                        self.stop()
                        raise AssertionError(f"rank {rank} of {n}: {failure}")
                if not ready:
                    self.stop()
                    raise AssertionError(f"ranks {sorted(set(range(n)) - set(results))} of {n} did not answer")
        return [results[rank] for rank in range(n)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._ends = [], []

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        self._ends.append(ours)


def _serve(end: Connection) -> None:
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
