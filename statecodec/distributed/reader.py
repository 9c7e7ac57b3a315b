"""StatecodecReader: `torch.distributed.checkpoint` loads from what StatecodecWriter wrote, on any number of ranks.

    dcp.load(state_dict, storage_reader=StatecodecReader("ckpt/100"))
    dcp.load(state_dict, storage_reader=StatecodecReader("s3://bucket/ckpt/100"))

A rank reads and decodes the chunks that hold rows of its own, and nothing else.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.distributed import INDEX, dcp_index
from statecodec.distributed.dcp_index import ItemLocation
from statecodec.distributed.folders import SaveFolder, StrPath, folder_at
from statecodec.errors import CorruptFile, FormatError, UsageError
from statecodec.format import Reader

_OPEN = 8  # files of other ranks that are kept open


class StatecodecReader(StorageReader):
    """Reads a compressed checkpoint from a folder, for `torch.distributed.checkpoint` (DCP).

    Values that are not tensors were pickled by DCP's planner when they were saved, and the planner unpickles them:
    torch does that itself, in both directions. Nothing else of the checkpoint is ever unpickled.

    Args:
        path: The folder, as StatecodecWriter takes it. A `checkpoint_id` of dcp.load goes before it.
        store: The fsspec file system or obstore store that `path` is in.

    Raises:
        FormatError: Through DCP, if the checkpoint cannot be read. CorruptFile names the file and the tensor.
    """

    def __init__(self, path: StrPath | None = None, *, store: Any = None) -> None:
        self._path, self._store = path, store
        self._digests: Mapping[str, str] = {}
        self._places: Mapping[MetadataIndex, ItemLocation] = {}

    @property
    def folder(self) -> SaveFolder:
        """The folder. Raises UsageError if none was given."""
        if self._path is None:
            raise UsageError("StatecodecReader needs a folder, or dcp.load a checkpoint_id")
        return folder_at(self._path, self._store)

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin a load, of another folder if there is a `checkpoint_id`."""
        if checkpoint_id is not None:
            self._path = checkpoint_id

    def read_metadata(self) -> Metadata:  # with **kwargs torch would expect metadata of each rank
        """Read what is in the checkpoint from its index."""
        index = dcp_index.read(self.folder)
        self._digests = index.digests
        index.metadata.storage_meta = StorageMeta(checkpoint_id=self._path)
        return index.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep from the metadata where every item is stored."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Decode what this rank asks for, file by file.

        Raises:
            FormatError: If a file is missing, damaged, or of another save.
        """
        items = sorted(plan.items, key=lambda item: self._places[item.storage_index].file)
        folder = self.folder
        with _files(folder, self._digests) as opened:
            for item in items:
                place = self._places[item.storage_index]
                try:
                    self._read(opened(place.file), place.name, item, planner)
                except FormatError as error:
                    raise type(error)(f"{folder}/{place.file}: {item.storage_index.fqn}: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @staticmethod
    def _read(stored: StoredCheckpoint, name: str, item: ReadItem, planner: LoadPlanner) -> None:
        if not math.prod(item.lengths) and item.type is LoadItemType.TENSOR:
            planner.commit_tensor(item, planner.resolve_tensor(item).detach())
            return
        if name not in stored.tensors:
            raise CorruptFile(f"there is no {name!r}: the index is of another save")
        tensor = stored.tensors[name]
        if item.type is LoadItemType.BYTE_IO:
            data = stored.decode_range(tensor.index, 0, tensor.numel)
            planner.load_bytes(item, io.BytesIO(data.numpy().tobytes()))
            return
        box = _decoded(stored, tensor.index, tuple(tensor.shape), tuple(item.storage_offsets), tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        target.copy_(box)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether it is a directory with an index; a URL may be."""
        return "://" in str(checkpoint_id) or (Path(checkpoint_id) / INDEX).is_file()


def _decoded(
    stored: StoredCheckpoint, item: int, shape: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...]
) -> Tensor:
    """A rectangular part of a stored tensor: its rows are decoded, then cut."""
    if not shape:
        return stored.decode_range(item, 0, 1).view(())
    if len(offsets) != len(shape) or any(a + n > d for a, n, d in zip(offsets, lengths, shape, strict=True)):
        raise CorruptFile(f"a box at {offsets} of {lengths} lies outside of {shape}")
    row = math.prod(shape[1:])
    rows = stored.decode_range(item, offsets[0] * row, (offsets[0] + lengths[0]) * row).view(lengths[0], *shape[1:])
    for dim in range(1, len(shape)):
        rows = rows.narrow(dim, offsets[dim], lengths[dim])
    return rows


@contextmanager
def _files(folder: SaveFolder, digests: Mapping[str, str]) -> Iterator[Any]:
    """Opens files of the checkpoint by name and keeps a few open. Raises FormatError for a file of another save."""
    held: OrderedDict[str, StoredCheckpoint] = OrderedDict()

    def opened(name: str) -> StoredCheckpoint:
        if name not in held:
            stored = StoredCheckpoint.of(Reader(name, open_file=lambda path: folder.open(path.name)))
            held[name] = stored
            if stored.reader.digest != digests.get(name):
                raise CorruptFile("not the file that the index was written with: damaged, or of another save")
            while len(held) > _OPEN:
                held.popitem(last=False)[1].close()
        held.move_to_end(name)
        return held[name]

    try:
        yield opened
    finally:
        for stored in held.values():
            stored.close()
