"""Lightning: a CheckpointIO whose checkpoints are compressed.

    from statecodec.integrations.lightning import CompressedCheckpointIO

    trainer = Trainer(..., plugins=[CompressedCheckpointIO()])
    trainer.fit(model, ckpt_path="last.ckpt")

It may stand inside of Lightning's AsyncCheckpointIO.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from statecodec.checkpoint.sniff import is_compressed
from statecodec.errors import UsageError
from statecodec.integrations import not_installed
from statecodec.integrations.replacing import checked
from statecodec.verbs.compress import compress
from statecodec.verbs.restore import restore

try:
    from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
except ImportError as error:
    raise not_installed("lightning") from error


class CompressedCheckpointIO(CheckpointIO):
    """Writes checkpoints compressed, under the names that Lightning gives them; reads them, and plain ones."""

    def __init__(self, preset: str = "resume", **options: Any) -> None:
        """Args:
            preset: As of `statecodec.compress`.
            options: Others of `statecodec.compress`: rules, max_step_error, pack ...

        Raises:
            UsageError, PolicyError: For options that `compress` does not take.
        """
        self._options = checked(preset, options)
        self._plain = TorchCheckpointIO()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Compress a checkpoint from memory. Raises UsageError, OutputFailed."""
        if storage_options is not None:
            raise UsageError("compressed checkpoints take no storage_options")
        target = _local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        compress(checkpoint, target, force=True, **self._options)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """What Lightning's own CheckpointIO loads from the restored file. Raises FormatError."""
        source = _local(path)
        if not is_compressed(source):
            return self._plain.load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        with tempfile.TemporaryDirectory(prefix=".loading-", dir=source.parent) as folder:
            restored = Path(folder) / "checkpoint.ckpt"
            restore(source, restored)
            return self._plain.load_checkpoint(restored, map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, compressed or not."""
        self._plain.remove_checkpoint(path)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UsageError(f"{path}: compressed checkpoints are local files")
    return Path(path)
