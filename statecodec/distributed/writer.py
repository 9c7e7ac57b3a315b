"""StatecodecWriter: compresses what `torch.distributed.checkpoint` saves.

    dcp.save(state_dict, storage_writer=StatecodecWriter("ckpt/100"))
    dcp.async_save(state_dict, storage_writer=StatecodecWriter("s3://bucket/ckpt/100", preset="small"))

Every rank writes one compressed file, `rank-N-....sc.safetensors`, with its own pieces; the coordinator then writes the
index, `statecodec.json`. Until that has its name, a checkpoint that was there before is the one that is loaded.
"""

from __future__ import annotations

import inspect
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.distributed import INDEX, dcp_index
from statecodec.distributed.dcp_index import ItemLocation
from statecodec.distributed.folders import SaveFolder, StrPath, folder_at
from statecodec.distributed.local_state import LocalState
from statecodec.errors import UsageError
from statecodec.verbs.compress import compress
from statecodec.verbs.settings import CompressSettings


class StatecodecWriter(StorageWriter):
    """Writes a compressed checkpoint into a folder that all ranks see, for `torch.distributed.checkpoint` (DCP).

    Weights and moments of torch optimizers are stored within the preset's fraction of an optimizer step, measured on
    each rank's own pieces; states of statecodec's optimizers are encoded already and are kept as they are. A rank
    writes one file, whatever its size.

    Args:
        path: The folder, made if it is not there: a directory, or a URL that fsspec knows. A `checkpoint_id` of
            dcp.save goes before it.
        store: An fsspec file system or an obstore store; `path` is then one in it.
        **settings: Settings of `statecodec.compress`: preset, rules, max_step_error, pack, threads ...

    Raises:
        UsageError: For `max_shard_size` and `base`, and for settings that `compress` does not take.
        PolicyError: For a preset or a rule that cannot be read.
        OutputFailed: Through DCP, if the folder cannot be written.
    """

    def __init__(self, path: StrPath | None = None, *, store: Any = None, **settings: Any) -> None:
        refused = {
            "max_shard_size": "every rank writes one file",
            "base": "a folder stands alone",
            "force": "it is set",
        }
        for name, why in refused.items():
            if name in settings:
                raise UsageError(f"StatecodecWriter takes no {name}: {why}")
        known, chosen = (inspect.signature(f).parameters for f in (compress, CompressSettings.of))
        if not settings.keys() <= known.keys():
            raise UsageError(f"compress takes no {', '.join(sorted(settings.keys() - known.keys()))}")
        CompressSettings.of(**{name: value for name, value in settings.items() if name in chosen})  # raises now
        self._path, self._store = path, store
        self._settings = settings

    @property
    def folder(self) -> SaveFolder:
        """The folder. Raises UsageError if none was given."""
        if self._path is None:
            raise UsageError("StatecodecWriter needs a folder, or dcp.save a checkpoint_id")
        return folder_at(self._path, self._store)

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin a save, to another folder if there is a `checkpoint_id`."""
        if checkpoint_id is not None:
            self._path = checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder."""
        self.folder.make()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank the name of its file."""
        save = secrets.token_hex(8)
        return [replace(plan, storage_data=dcp_index.rank_file(i, save)) for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Compress this rank's pieces into its file."""
        results = []
        if plan.items:
            name = str(plan.storage_data)
            local = LocalState.of(plan, planner)
            with self.folder.staged(name) as path:
                compress(local.value, path, force=True, max_shard_size=None, **self._settings)
                digest = _verified_digest(path, local)
            results = [
                WriteResult(index, local.pieces[index].nbytes, (ItemLocation(name, stored), digest))
                for index, stored in local.names.items()
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, then remove what earlier saves left."""
        places: dict[MetadataIndex, ItemLocation] = {}
        digests: dict[str, str] = {}
        for result in (result for rank in results for result in rank):
            place, digest = result.storage_data
            places[result.index], digests[place.file] = place, digest
        folder = self.folder
        folder.write(INDEX, dcp_index.to_bytes(metadata, places, digests))
        for name in dcp_index.leftovers(folder, digests):
            folder.remove(name)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Accept every path and URL; an unusable one fails when the folder is made."""
        return True

    def storage_meta(self) -> StorageMeta:
        """Where the checkpoint is, as DCP passes it to the planner."""
        return StorageMeta(checkpoint_id=self._path, save_id=None)


def _verified_digest(path: Path, local: LocalState) -> str:
    """The digest of a file that holds every piece under its name. Raises UsageError."""
    with StoredCheckpoint.open(path) as stored:
        for index, name in local.names.items():
            piece, tensor = local.pieces[index], stored.tensors.get(name)
            there = None if tensor is None else (tuple(tensor.shape), tensor.dtype.name)
            if name and there != (tuple(piece.shape), str(piece.dtype).removeprefix("torch.")):
                raise UsageError(f"{index.fqn!r} cannot be told apart from other tensors in {path.name}")
        return stored.reader.digest
