"""Writes a dict as a DCP folder, with torch.distributed.checkpoint itself, in this one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save


class _Telling(DefaultSavePlanner):
    """Tells when a tensor is asked for: the one before it is written then."""

    def __init__(self, used: Callable[[int], None]) -> None:
        super().__init__()
        self._used, self._before = used, 0

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._used(self._before)
        found = super().resolve_data(write_item)
        self._before = found.nbytes if isinstance(found, torch.Tensor) else 0
        return found


def write_dcp(value: dict[str, Any], folder: Path, used: Callable[[int], None]) -> None:
    """Write `value` into `folder`; `used` is told the bytes of every tensor when it is written. Raises OSError."""
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed is meant
        save(value, storage_writer=writer, planner=_Telling(used), no_dist=True)
