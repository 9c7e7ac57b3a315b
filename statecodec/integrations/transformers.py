"""The Trainer of transformers: its checkpoints are compressed while training goes on, and resumed from.

    from statecodec.integrations.transformers import CompressCheckpoints, last_checkpoint

    trainer = Trainer(..., callbacks=[CompressCheckpoints()])
    with last_checkpoint(trainer.args.output_dir) as checkpoint:    # None if there is none yet
        trainer.train(resume_from_checkpoint=checkpoint)

The live optimizers go in as `Trainer(optimizer_cls_and_kwargs=(statecodec.optim.AdamW, {"lr": 3e-4}))`.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from statecodec.integrations import not_installed
from statecodec.integrations.replacing import Replacing, checked
from statecodec.suffixes import SUFFIX
from statecodec.verbs.paths import compressed_path
from statecodec.verbs.restore import restore

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise not_installed("transformers") from error

_log = logging.getLogger(__name__)
_NAME = re.compile(rf"checkpoint-(\d+)({re.escape(SUFFIX)})?")
_WRITTEN_LAST = "trainer_state.json"


class CompressCheckpoints(TrainerCallback):
    """Replaces every `checkpoint-N` of a Trainer by `checkpoint-N.sc.safetensors`, while training goes on.

    A process of its own compresses one checkpoint after the other; training waits for what is left only at its end.
    `save_total_limit` counts both forms. The checkpoint that the Trainer calls the best stays a folder, for
    `load_best_model_at_end`. What cannot be compressed stays a folder, and is logged as a warning.

    Args:
        preset: As for `statecodec.compress`.
        threads: Number of threads of that process.
        **options: Others of `statecodec.compress`: rules, max_step_error, pack ...

    Raises:
        UsageError: For options that contradict each other.
        PolicyError: For a preset or a rule that cannot be read.
    """

    def __init__(self, preset: str = "resume", *, threads: int = 1, **options: Any) -> None:
        self._options = {**checked(preset, options), "threads": threads}
        self._waiting: list[Path] = []
        self._running: Replacing | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the whole checkpoints that a killed run left as folders, up to the step that this one goes on from.

        Later ones are written again. What is resumed from was read when the first step is done.
        """
        folder = Path(args.output_dir)
        if state.is_world_process_zero and folder.is_dir():
            left = [
                path for step, forms in sorted(_steps(folder).items()) if step <= state.global_step for path in forms
            ]
            self._waiting += [path for path in left if path.is_dir() and _is_whole(path) and path not in self._waiting]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that a checkpoint was written, and remove the oldest ones."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            self._waiting.append(folder / f"checkpoint-{state.global_step}")
            _rotate(folder, args.save_total_limit, state.best_model_checkpoint)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compress the next checkpoint: by now every rank has written its part of it."""
        if self._running is None or self._running.done:
            self._next(state.best_model_checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until every checkpoint is compressed."""
        args.distributed_state.wait_for_everyone()
        while self._next(state.best_model_checkpoint):
            pass

    def _next(self, best: str | None) -> bool:
        """Wait for the running process and start it on the next checkpoint; False if there is none."""
        if self._running is not None:
            wrong = self._running.wait()
            if wrong and self._running.folder.is_dir():  # otherwise `save_total_limit` removed it meanwhile
                _log.warning("%s stays as it is: %s", self._running.folder, wrong)
            self._running = None
        for folder in self._waiting:
            if best is None or folder != Path(best):
                self._waiting.remove(folder)
                if folder.is_dir():
                    self._running = Replacing(folder, self._options)
                    return True
                return self._next(best)
        return False


@contextmanager
def last_checkpoint(path: str | Path) -> Iterator[str | None]:
    """Find a folder to resume from, for a `with` block.

    A compressed checkpoint is restored into a folder beside it, which is removed when the block ends; each process has
    its own.

    Args:
        path: The Trainer's `output_dir`, of which the newest checkpoint is taken; or one checkpoint, compressed or not.

    Yields:
        The folder; None if there is no checkpoint.

    Raises:
        FormatError: If a compressed checkpoint cannot be read.
        OutputFailed: If the folder cannot be written.
    """
    root = Path(path)
    steps = _steps(root) if root.is_dir() and not (root / _WRITTEN_LAST).is_file() else {0: [root]}
    whole = [checkpoint for step in sorted(steps, reverse=True) for checkpoint in steps[step] if _is_whole(checkpoint)]
    if not whole or whole[0].is_dir():
        yield str(whole[0]) if whole else None
        return
    with tempfile.TemporaryDirectory(prefix=".resuming-", dir=whole[0].parent) as folder:
        restore(whole[0], Path(folder) / "checkpoint")
        yield str(Path(folder) / "checkpoint")


def _steps(folder: Path) -> dict[int, list[Path]]:
    """Step -> its checkpoint as a folder, then as a file, of those that are there."""
    by_step: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() is (match[2] is None):
            by_step.setdefault(int(match[1]), []).append(path)
    return by_step


def _is_whole(checkpoint: Path) -> bool:
    return checkpoint.is_file() or (checkpoint / _WRITTEN_LAST).is_file()


def _rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, as the Trainer does; never the newest nor the best."""
    if limit is None or limit <= 0:
        return
    steps = _steps(folder)
    kept = {max(steps, default=0), *(s for s, forms in steps.items() if best and Path(best) in _both(forms))}
    excess = len(steps) - max(limit, len(kept))
    for step in sorted(set(steps) - kept)[: max(excess, 0)]:
        for checkpoint in steps[step]:
            shutil.rmtree(checkpoint, ignore_errors=True) if checkpoint.is_dir() else checkpoint.unlink(missing_ok=True)


def _both(forms: list[Path]) -> set[Path]:
    """The names of a step's folder and file."""
    folder = forms[0].with_name(forms[0].name.removesuffix(SUFFIX))
    return {folder, compressed_path(folder)}
