"""Reading a checkpoint from Python: one tensor at a time (`open`), or the nested object it was saved as (`load`)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statecodec.checkpoint.document import StoredFile
from statecodec.checkpoint.native import load_native
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.source_files import SourceFiles
from statecodec.checkpoint.stored import Stored
from statecodec.checkpoint.tensor_sets import is_compressed
from statecodec.choose import Policy
from statecodec.choose.plan import Plan, make_plan
from statecodec.codecs import EncodedTensor
from statecodec.errors import FormatError, MalformedCheckpoint, UsageError
from statecodec.layouts import FileBytes, View, locate
from statecodec.layouts.tree import tree, window
from statecodec.streams import memory, read_exactly


@dataclass(frozen=True)
class _Place:
    """Where a named tensor is: its view, and the item its region is stored as."""

    view: View
    item: int


class Checkpoint:
    """An open checkpoint, compressed or not: named tensors, read one at a time. Close it, or use `with`."""

    def __init__(self, path: str | Path) -> None:
        """Open and check the headers. Raises FormatError or LayoutError."""
        self.path = Path(path)
        self._stored = Stored.open(path) if is_compressed(path) else None
        self._places: dict[str, _Place] = {}
        if self._stored is not None:
            document = self._stored.document
            for file in document.files:
                prefix = f"{file.path}:" if document.is_directory else ""
                for view in file.views:
                    self._places[prefix + view.name] = _Place(view, file.regions[view.region][1])
        else:
            source = locate(path)
            self._plan: Plan = make_plan(source, Policy(()))
            self._files = SourceFiles(source)
            items: list[list[int]] = [[] for _ in source.files]
            for i, planned in enumerate(self._plan.items):
                if planned.region is not None:
                    items[planned.file].append(i)
            for number, located in enumerate(source.files):
                prefix = f"{located.path}:" if source.is_directory else ""
                for view in located.views:
                    self._places[prefix + view.name] = _Place(view, items[number][view.region])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._stored is not None:
            self._stored.close()

    def names(self) -> list[str]:
        """Names of all tensors: key paths such as `optimizer.state.0.exp_avg`, `FILE:` before them in a directory."""
        return list(self._places)

    def info(self, name: str) -> dict[str, Any]:
        """role, param, shape, dtype and codec config of a tensor."""
        place = self._place(name)
        if self._stored is not None:
            item = self._stored.reader.items[place.item]
            attributes, codec = item.attributes, item.codec.config()
        else:
            planned = self._plan.items[place.item]
            attributes, codec = planned.item.attributes, planned.item.codec.config()
        return {
            "role": attributes.get("role"), "param": attributes.get("param"), "shape": place.view.shape,
            "dtype": str(place.view.dtype).removeprefix("torch."), "codec": codec,
        }  # fmt: skip

    def read(self, name: str) -> Tensor:
        """One tensor, checked and decoded; touches only its bytes. Raises UsageError, FormatError, LayoutError."""
        place = self._place(name)
        if self._stored is not None:
            whole = self._stored.decode(place.item)
        else:
            planned = self._plan.items[place.item]
            whole = self._files.read_all(self._plan, planned)
        storage = whole.reshape(-1).view(torch.uint8)
        return window(storage, place.view.dtype, place.view.shape, place.view.stride, place.view.offset)

    def read_encoded(self, name: str) -> EncodedTensor:
        """One tensor as it is stored, not decoded. Raises UsageError for an uncompressed checkpoint."""
        if self._stored is None:
            raise UsageError(f"{self.path} is not compressed: it holds no encoded tensors")
        place = self._place(name)
        return self._stored.encoded(place.item)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            close = [n for n in self._places if name in n or n.endswith("." + name)][:3]
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UsageError(f"{self.path} has no tensor {name!r}{hint}")
        return self._places[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, compressed or not, to read single tensors."""
    return Checkpoint(path)


def load(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """The nested object that torch.load would give (safetensors: {name: tensor}; a directory: {path: content}),
    decoded.

    Nothing the file names is imported or run: unknown classes come back as OpaqueObject with their name and contents.
    Tensors that shared memory share it again. Raises FormatError or LayoutError.
    """
    if not is_compressed(path):
        source = locate(path)
        if not source.is_directory:
            return _load_source(source.root, source.files[0].layout, device)
        return {f.path: _load_source(source.root / f.path, f.layout, device) for f in source.files}
    with Stored.open(path) as stored:
        document = stored.document
        if document.source["layout"] == "native":
            return load_native(stored, device)
        if not document.is_directory:
            return _load_file(stored, document.files[0], device)
        return {f.path: _load_file(stored, _original(f, document.files), device) for f in document.files}


def _load_source(path: Path, layout: str, device: torch.device | str) -> Any:
    if layout == "opaque":
        return path.read_bytes()
    with path.open("rb") as file:
        content = FileBytes(file.fileno(), path.name)

        def read(offset: int, nbytes: int) -> Tensor:
            out = torch.empty(nbytes, dtype=torch.uint8)
            read_exactly(file.fileno(), offset, memory(out), path.name)
            return out.to(device)

        return tree(content, read)


def _original(file: StoredFile, files: tuple[StoredFile, ...]) -> StoredFile:
    return next(f for f in files if f.path == file.same_as) if file.same_as else file


def _load_file(stored: Stored, file: StoredFile, device: torch.device | str) -> Any:
    content = _RestoredBytes(stored, file)
    if file.layout == "opaque":
        return content.tensor(0, file.nbytes).numpy().tobytes()
    try:
        return tree(content, lambda offset, nbytes: content.tensor(offset, nbytes).to(device))
    except MalformedCheckpoint as error:
        raise FormatError(f"{stored.path}: the stored skeleton of {file.path} is not a checkpoint: {error}") from error


class _RestoredBytes:
    """The bytes of the file as `restore` would write it, decoded on demand."""

    def __init__(self, stored: Stored, file: StoredFile) -> None:
        items = stored.reader.items
        self.stored, self.file, self.size = stored, file, file.nbytes
        self._regions = [(offset, items[i].decoded_nbytes, i) for offset, i in file.regions]
        self._skeleton = Skeleton(file.nbytes, ((o, n) for o, n, _ in self._regions))
        self._starts = [r[0] for r in self._regions]
        self._bytes = stored.decode(file.skeleton).numpy() if file.skeleton is not None else None

    def read(self, offset: int, nbytes: int) -> bytes:
        """A range of the file, as bytes."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise MalformedCheckpoint(f"needs bytes {offset}..{offset + nbytes} but the file has {self.size}")
        return self.tensor(offset, nbytes).numpy().tobytes()

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        """A range of the file, as a fresh 1-D uint8 tensor."""
        first = max(bisect_right(self._starts, offset) - 1, 0)
        if self._regions and self._regions[first][:2] == (offset, nbytes):
            return self.stored.decode(self._regions[first][2]).reshape(-1).view(torch.uint8)
        out = torch.empty(nbytes, dtype=torch.uint8)
        for start, length, item in self._regions[first:]:
            if start >= offset + nbytes:
                break
            low, high = max(start, offset), min(start + length, offset + nbytes)
            if low < high:
                data = self.stored.decode(item).reshape(-1).view(torch.uint8)
                out[low - offset : high - offset] = data[low - start : high - start]
        for low, length in self._skeleton.within(offset, offset + nbytes):
            assert self._bytes is not None
            at = self._skeleton.position(low)
            out.numpy()[low - offset : low - offset + length] = self._bytes[at : at + length]
        return out
