"""Writes a dict as a DCP folder, with torch.distributed.checkpoint itself, in this one process.

torch.save of an item looks at all of it at once, so large tensors are cut into pieces of some rows, each an item of its
own, as many ranks would have written them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from statecodec.buffers import memory
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

_PIECE: Final = 64 << 20  # bytes


def write_dcp(value: dict[str, Any], folder: Path, used: Callable[[int], None]) -> None:
    """Write `value` into `folder`; `used` is called with the bytes of everything that was written. Raises OSError."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nothing is distributed
        save(value, storage_writer=writer, planner=_planner(used), no_dist=True)


def _planner(used: Callable[[int], None]) -> SavePlanner:
    """torch's own planner, for pieces. `used` is called when an item is asked for: the one before is written then."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import WriteItemType

    class InPieces(DefaultSavePlanner):
        before = 0

        def create_local_plan(self) -> SavePlan:
            plan = super().create_local_plan()
            items = [piece for item in plan.items for piece in _pieces(item, self.lookup_object(item.index))]
            self.plan = replace(plan, items=items)
            return self.plan

        def resolve_data(self, write_item: WriteItem) -> Any:
            used(self.before)
            data = self.lookup_object(replace(write_item.index, offset=None, index=None))
            if write_item.type is WriteItemType.SHARD:
                assert write_item.tensor_data is not None
                data = _rows(data, write_item.tensor_data.chunk)
            self.before = data.nbytes if isinstance(data, torch.Tensor) else 0
            return self.transform_object(write_item, data)

    return InPieces()


def _pieces(item: WriteItem, value: Any) -> Iterator[WriteItem]:
    """An item of the whole value, or one for every piece of it."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import WriteItemType

    if item.tensor_data is None or value.nbytes <= _PIECE or not value.is_contiguous():
        yield item
        return
    count = max(1, _PIECE * len(value) // value.nbytes)
    for start in range(0, len(value), count):
        offsets = torch.Size([start, *[0] * (value.ndim - 1)])
        chunk = ChunkStorageMetadata(offsets, torch.Size([min(count, len(value) - start), *value.shape[1:]]))
        data = replace(item.tensor_data, chunk=chunk)
        yield replace(item, index=replace(item.index, offset=offsets), type=WriteItemType.SHARD, tensor_data=data)


def _rows(whole: Tensor, chunk: ChunkStorageMetadata) -> Tensor:
    """Rows of a contiguous tensor, in the same memory, on a storage that holds no more: torch copies them otherwise."""
    data = memory(whole.detach()[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]])
    return torch.frombuffer(data, dtype=torch.uint8).view(whole.dtype).view(chunk.sizes)
