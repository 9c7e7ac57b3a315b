"""Lightning: a CheckpointIO whose checkpoints are compressed.

    from statecodec.integrations.lightning import CompressedCheckpointIO

    trainer = Trainer(..., plugins=[CompressedCheckpointIO()])
    trainer.fit(model, ckpt_path="last.ckpt")

Lightning's AsyncCheckpointIO can wrap it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from statecodec.checkpoint.sniff import is_compressed
from statecodec.distributed import StatecodecReader, StatecodecWriter
from statecodec.errors import UsageError
from statecodec.integrations import not_installed
from statecodec.integrations.replacing import checked
from statecodec.verbs.compress import compress
from statecodec.verbs.restore import restore

try:
    from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
    from lightning.pytorch.strategies import ModelParallelStrategy
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


class CompressedModelParallelStrategy(ModelParallelStrategy):
    """Every rank writes its shards compressed into one folder; any number of ranks reads it.

    A folder is whole when `statecodec.distributed.INDEX` is in it, which is written last.

    Args:
        preset: As of `statecodec.compress`.
        options: Others of `statecodec.compress`: rules, max_step_error, pack ...
        **parallel: Of ModelParallelStrategy: data_parallel_size, tensor_parallel_size ...

    Raises:
        UsageError: For options that `compress` does not take, and for save_distributed_checkpoint=False.
        PolicyError: For a preset or a rule that cannot be read.
    """

    def __init__(self, preset: str = "resume", options: dict[str, Any] | None = None, **parallel: Any) -> None:
        super().__init__(**parallel)
        if not self._save_distributed_checkpoint:
            raise UsageError("save_distributed_checkpoint=False: every rank writes its own shards, into one folder")
        self._options: dict[str, Any] = {"preset": preset, **(options or {})}
        StatecodecWriter(**self._options)  # refuse wrong settings now

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the shards of this rank; loops, callbacks and schedulers are the first rank's. All ranks call it.

        Args:
            checkpoint: What Lightning gathered; its tensors are this rank's.
            filepath: The folder, as the first rank has it; a directory that all ranks see, or a URL.
            storage_options: None.

        Raises:
            UsageError: For storage_options.
            CheckpointException: DCP's, of what failed on any rank.
        """
        if storage_options is not None:
            raise UsageError("compressed checkpoints take no storage_options")
        state: dict[str, Any] = {
            "state_dict": checkpoint.pop("state_dict"),
            "optimizers": _numbered(checkpoint.pop("optimizer_states", [])),
        }
        if self.is_global_zero:  # of what several ranks have, DCP takes any rank's
            state["rest"] = SimpleNamespace(**checkpoint)
        save(state, storage_writer=StatecodecWriter(self.broadcast(str(filepath)), **self._options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the model and its optimizers in place. All ranks call it.

        Args:
            checkpoint_path: The folder, as the first rank has it.
            weights_only: Not true: what is not a tensor was pickled, as in all that DCP writes.

        Returns:
            The rest of the checkpoint: loops, callbacks, schedulers.

        Raises:
            UsageError: For weights_only.
            CheckpointException: DCP's, of what failed on any rank.
        """
        if weights_only:
            raise UsageError("what is not a tensor was pickled by torch.distributed.checkpoint: weights_only=False")
        states = _numbered([get_optimizer_state_dict(self.model, optimizer) for optimizer in self.optimizers])
        state: dict[str, Any] = {
            "state_dict": get_model_state_dict(self.model),
            "optimizers": states,
            "rest": SimpleNamespace(),
        }
        load(state, storage_reader=StatecodecReader(self.broadcast(str(checkpoint_path))))
        set_model_state_dict(
            self.model, state["state_dict"], options=StateDictOptions(strict=self.lightning_module.strict_loading)
        )
        for optimizer, own in zip(self.optimizers, state["optimizers"].values(), strict=True):
            set_optimizer_state_dict(self.model, optimizer, own)
        rest: dict[str, Any] = vars(state["rest"])
        return rest


def _numbered(states: list[Any]) -> dict[str, Any]:
    return {str(number): state for number, state in enumerate(states)}


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UsageError(f"{path}: compressed checkpoints are local files")
    return Path(path)
