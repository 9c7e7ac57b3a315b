"""Replaces a checkpoint folder by a compressed file beside it, here or in another process.

The folder disappears by one rename, once the file is complete, read back and compared with it. Whenever the process is
killed, what has the folder's name is what the framework wrote, and what has the file's name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statecodec.checkpoint.report import Report
from statecodec.verbs.compress import compress
from statecodec.verbs.paths import compressed_path
from statecodec.verbs.settings import CompressSettings


def checked(preset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `compress` for one file, checked before anything is written. Raises UsageError, PolicyError."""
    CompressSettings.of(preset=preset, **options)
    return {"preset": preset, "max_shard_size": None, **options}


def replace_by_compressed(folder: Path, options: Mapping[str, Any]) -> Report:
    """Compress a folder into `compressed_path(folder)`, verify the file, and remove the folder.

    Raises as `compress`.
    """
    report = compress(folder, compressed_path(folder), force=True, verify=True, device="cpu", **options)
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed here
    os.rename(folder, gone)
    shutil.rmtree(gone)
    return report


class Replacing:
    """`replace_by_compressed` in another process, with a low priority and without a GPU."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.folder = folder
        command = [
            sys.executable,
            "-c",
            f"from {__name__} import _main; _main()",
            str(folder),
            json.dumps(dict(options)),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )

    @property
    def done(self) -> bool:
        """Whether the process has ended, with or without an error."""
        return self._process.poll() is not None

    def wait(self) -> str | None:
        """Wait until the process ends. Returns its error message, if there is one."""
        _, said = self._process.communicate()
        lines = said.strip().splitlines()
        return None if self._process.returncode == 0 else lines[-1] if lines else f"exit {self._process.returncode}"


def _main() -> None:
    os.nice(10)
    replace_by_compressed(Path(sys.argv[1]), json.loads(sys.argv[2]))
