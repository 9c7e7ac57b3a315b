"""Lightning: a CheckpointIO whose checkpoints are compressed.

    from statecodec.integrations.lightning import CompressedCheckpointIO

    trainer = Trainer(..., plugins=[CompressedCheckpointIO()])
    trainer.fit(model, ckpt_path="last.ckpt")

Lightning's AsyncCheckpointIO can wrap it.
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
    """Writes checkpoints compressed, under the names that Lightning gives them; reads them, and plain ones.

    Args:
        preset: As for `statecodec.compress`.
        **options: Others of `statecodec.compress`: rules, max_step_error, pack ...

    Raises:
        UsageError: For options that contradict each other.
        PolicyError: For a preset or a rule that cannot be read.
    """

    def __init__(self, preset: str = "resume", **options: Any) -> None:
        self._options = checked(preset, options)
        self._plain = TorchCheckpointIO()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Compress a checkpoint from memory.

        Args:
            checkpoint: The object to save.
            path: The local file to write; one that is there is replaced.
            storage_options: Must be None.

        Raises:
            UsageError: For storage_options, or a URL.
            OutputFailed: If it cannot be written.
        """
        if storage_options is not None:
            raise UsageError("compressed checkpoints take no storage_options")
        target = _local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        compress(checkpoint, target, force=True, **self._options)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load what Lightning's own CheckpointIO loads from the restored file.

        Args:
            path: The local file, compressed or not.
            map_location: As for torch.load.
            weights_only: As for torch.load.

        Returns:
            The object.

        Raises:
            FormatError: If a compressed file cannot be read.
            UsageError: For a URL.
        """
        source = _local(path)
        if not is_compressed(source):
            return self._plain.load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        with tempfile.TemporaryDirectory(prefix=".loading-", dir=source.parent) as folder:
            restored = Path(folder) / "checkpoint.ckpt"
            restore(source, restored)
            return self._plain.load_checkpoint(restored, map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, compressed or not.

        Args:
            path: The file.
        """
        self._plain.remove_checkpoint(path)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UsageError(f"{path}: compressed checkpoints are local files")
    return Path(path)
