"""Compressing one huge checkpoint on the machines of a Ray cluster: its shares are tasks.

Every node sees the checkpoint and the folder of the output under the same paths (a shared file system). Ray starts a
task again where its process or its node died; a share that was finished before is kept.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from statecodec.checkpoint.report import Report
from statecodec.errors import BackendUnavailable, OutputFailed
from statecodec.progress import Meter, Progress
from statecodec.verbs.compress import open_source
from statecodec.verbs.finalize import finalize
from statecodec.verbs.settings import CompressSettings
from statecodec.verbs.shares import MAX_SHARES, ShareReport, compress_share

_PER_CPU = 4  # shares per CPU: more make a lost one cheaper and the end more even
_LEAST = 64 << 20  # bytes of a share; smaller ones are not worth a task


def compress_on_ray(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    address: str = "auto",
    shares: int | None = None,
    retries: int = 3,
    verify: bool = False,
    force: bool = False,
    base: str | Path | None = None,
    device: str = "cpu",
    safe_only: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Compress `src` into `dst` with Ray; the file has the same bytes as that of a single process.

    Args:
        src: As for `compress`; absolute, or relative to the folder that this process runs in.
        dst: As for `compress`; absolute, or relative to that folder.
        address: Of a running cluster (`auto`: the one that this machine belongs to); `local` starts one here. Without
            effect if ray is connected already.
        shares: How many tasks; by default four for every CPU of the cluster, each of at least 64 MiB.
        retries: How often a share is tried again whose process or node died.
        verify: As for `compress`.
        force: As for `compress`.
        base: As for `compress`.
        device: As for `compress`. A task takes one CPU, on `cuda` a GPU as well.
        safe_only: As for `compress`.
        progress: Called after every share that is done.
        **settings: Settings of `compress` (preset, rules, max_step_error, pack ...).

    Returns:
        The report of the compressed file.

    Raises:
        BackendUnavailable: If ray is not installed, or cannot be reached.
        OutputFailed: If a share could not be made, because its node died too often for instance.
        StatecodecError: Others as `compress` does.
    """
    started = time.perf_counter()
    ray = _connected(address)
    src = Path(src).absolute()
    dst = None if dst is None else f"{Path(dst).absolute()}{'/' if str(dst).endswith('/') else ''}"
    base = None if base is None else Path(base).absolute()
    # Rules are sent as text: a file of them need not be there on every node.
    chosen = CompressSettings.of(**settings)
    settings = {
        **settings, "rules": [str(rule) for rule in chosen.caller_policy.rules], "rules_file": None,
        "max_shard_size": chosen.max_shard_size,
    }  # fmt: skip
    with open_source(src) as source:
        count = shares or _count(source.nbytes, int(ray.cluster_resources().get("CPU", 1)))
        meter = Meter(progress, source.nbytes, f"{count} shares on ray")
        each = source.nbytes // count
    task = ray.remote(num_cpus=1, num_gpus=1 if device == "cuda" else 0, max_retries=retries)(_share)
    common = {"base": base, "device": device, "force": force, "safe_only": safe_only, "threads": 1, **settings}
    waiting = [task.remote(src, dst, f"{number}/{count}", common) for number in range(1, count + 1)]
    try:
        while waiting:
            (done, *_), waiting = ray.wait(waiting, num_returns=1)
            ray.get(done)
            meter.add(each)
    except ray.exceptions.RayTaskError as error:  # an error of the library in the task
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise OutputFailed(f"ray gave up after {retries} retries, what is done is kept: {error}") from error
    finally:
        for unfinished in waiting:
            ray.cancel(unfinished, force=True)  # a worker that was interrupted while it imported torch stays broken
    report = finalize(src, dst, verify=verify, force=force, progress=progress)
    return replace(report, seconds=time.perf_counter() - started)


def _share(src: Path, dst: str | None, share: str, common: dict[str, Any]) -> ShareReport:
    return compress_share(src, dst, share=share, **common)


def _count(nbytes: int, cpus: int) -> int:
    return max(1, min(_PER_CPU * cpus, nbytes // _LEAST, MAX_SHARES))


def _connected(address: str) -> Any:
    """The module ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable("ray is not installed: pip install 'statecodec[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BackendUnavailable(f"ray at {address} cannot be reached: {error}") from error
    return ray
