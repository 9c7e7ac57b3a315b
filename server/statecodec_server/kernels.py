"""The library's compiled kernels: made once by the worker, before any job, and only read by conversions.

numba keeps compiled code as pickles, so whoever can write there runs code in every later job. The folder is named
after everything the code depends on; it appears whole, under a lock, and is then write-protected.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .settings import Settings

log = logging.getLogger("statecodec.server.kernels")
_PATIENCE = 900.0


def _sources(backend: str) -> list[Path]:
    spec = importlib.util.find_spec(backend)
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _name(backend: str) -> str:
    digest = hashlib.sha256(f"{sys.version}\n{_processor()}\n".encode())
    for package in ("numba", "llvmlite", "numpy", "torch"):
        digest.update(f"{package} {_installed(package)}\n".encode())
    for path in _sources(backend):
        digest.update(f"{path}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def folder(settings: Settings) -> Path:
    """Where the compiled kernels of this installation lie, or will lie."""
    return (settings.kernels or settings.data / "kernels").resolve() / _name(settings.backend)


def prepare(settings: Settings) -> Path:
    """Compile the kernels unless that has been done; the folder to hand to conversions.

    A failure is logged, and conversions then compile what they need themselves, each anew.
    """
    target = folder(settings)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        log.info("compiling the kernels")
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="compiling-"))
        try:
            _compile(settings, scratch / "kernels", scratch / "work")
            _protect(scratch / "kernels")
            os.rename(scratch / "kernels", target)
        except (OSError, subprocess.SubprocessError) as error:
            tail = getattr(error, "stderr", None) or b""
            fields = {"error": str(error), "log": tail.decode(errors="replace")[-2000:]}
            log.error("the kernels could not be compiled", extra={"fields": fields})
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _compile(settings: Settings, kernels: Path, work: Path) -> None:
    kernels.mkdir()
    work.mkdir()
    environment = child_environment(settings, kernels)
    command = [sys.executable, "-P", "-m", "statecodec_server.warm", settings.backend]
    subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True, timeout=_PATIENCE)


def _protect(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)


def child_environment(settings: Settings, kernels: Path) -> dict[str, str]:
    """What a child may know: no credentials of the worker's, the compiled kernels, few threads, no GPU."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ}
    threads = str(settings.job_threads)
    return kept | {
        "LANG": "C.UTF-8", "HOME": "/nonexistent", "NUMBA_CACHE_DIR": str(kernels),
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",  # its threads would start at import, before the sandbox
        "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
