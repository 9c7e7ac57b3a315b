"""Writes a dict as a DCP folder, with torch.distributed.checkpoint itself, in this one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlanner


def write_dcp(value: dict[str, Any], folder: Path, used: Callable[[int], None]) -> None:
    """Write `value` into `folder`; `used` is called with the bytes of every tensor that was written. Raises OSError."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nothing is distributed
        save(value, storage_writer=writer, planner=_planner(used), no_dist=True)


def _planner(used: Callable[[int], None]) -> SavePlanner:
    """torch's own planner, which calls `used` when a tensor is asked for: the one before it is written then."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    class Telling(DefaultSavePlanner):
        before = 0

        def resolve_data(self, write_item: Any) -> Any:
            used(self.before)
            data = super().resolve_data(write_item)
            self.before = data.nbytes if isinstance(data, torch.Tensor) else 0
            return data

    return Telling()
