"""Accelerate: `save_state` and `load_state` whose checkpoints are compressed files.

from statecodec.integrations.accelerate import load_state, save_state

path = save_state(accelerator, "run/step-1000")     # run/step-1000.sc.safetensors
load_state(accelerator, path)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from statecodec.checkpoint.sniff import is_compressed
from statecodec.errors import UsageError
from statecodec.integrations import not_installed
from statecodec.integrations.replacing import checked, replace_by_compressed
from statecodec.verbs.paths import compressed_path
from statecodec.verbs.restore import restore

try:
    from accelerate import Accelerator
except ImportError as error:
    raise not_installed("accelerate") from error


def save_state(accelerator: Accelerator, output_dir: str | Path, preset: str = "resume", **options: Any) -> Path:
    """Call `accelerator.save_state(output_dir)`, then replace that folder by a compressed file beside it.

    Call it in every process. Whenever it is killed, the folder as accelerate wrote it or the complete file is there.

    Args:
        accelerator: The accelerator whose state to save.
        output_dir: The folder; the file gets its name, with `.sc.safetensors`.
        preset: As for `statecodec.compress`.
        **options: Others of `statecodec.compress`: rules, max_step_error, pack ...

    Returns:
        The file.

    Raises:
        UsageError: For options that contradict each other, and under automatic checkpoint naming, which counts folders.
        PolicyError: For a preset or a rule that cannot be read.
        OutputFailed: If it cannot be written.
    """
    chosen = checked(preset, options)
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise UsageError("automatic_checkpoint_naming counts folders: turn it off and name each checkpoint")
    folder = Path(output_dir)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_by_compressed(folder, chosen)
    accelerator.wait_for_everyone()
    return compressed_path(folder)


def load_state(accelerator: Accelerator, path: str | Path, **keywords: Any) -> None:
    """Call `accelerator.load_state` on a compressed checkpoint, or on a folder.

    Call it in every process; each restores a copy of its own beside the file, and removes it.

    Args:
        accelerator: The accelerator whose state to load.
        path: The compressed file, or the folder; the folder's name will do where only the file is there.
        **keywords: Passed to `accelerator.load_state`.

    Raises:
        FormatError: If the compressed file cannot be read.
        OutputFailed: If the copy cannot be written.
    """
    source = Path(path)
    if not source.exists() and compressed_path(source).exists():
        source = compressed_path(source)
    if not is_compressed(source):
        accelerator.load_state(str(source), **keywords)
        return
    with tempfile.TemporaryDirectory(prefix=".loading-", dir=source.parent) as folder:
        restore(source, Path(folder) / "state")
        accelerator.load_state(str(Path(folder) / "state"), **keywords)
