"""Tensors on disk that are used as if they were in memory: working on one at a time takes the memory of one."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from statecodec.buffers import memory
from statecodec.errors import OutputFailed
from statecodec.files import reserve, write_exactly
from statecodec.layouts.payload import MEMORY
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc keeps what is freed, and an aligned tensor does not fit into the hole that one of its size left."""
_LARGE = 1 << 20  # bytes of a tensor that is worth a place on disk
_BETWEEN = 32 << 20  # bytes read or written between two releases
_ZEROS = bytes(_LARGE)


class Spill:
    """A file without a name, in the folder of an output. Its tensors are valid as long as it is open."""

    def __init__(self, folder: Path) -> None:
        """Raises OutputFailed."""
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise OutputFailed(f"cannot write into {folder}: {error.strerror or error}") from error
        self._fd = self._file.fileno()
        self._maps: list[mmap.mmap] = []
        self._size = self._since = 0

    def take(self, nbytes: int) -> Tensor:
        """So many bytes, 1-D uint8 with arbitrary contents: in the file, if they are many. Raises OutputFailed."""
        if nbytes < _LARGE:
            return MEMORY.take(nbytes)
        with self._room(nbytes) as offset:
            if not reserve(self._fd, offset + nbytes):  # writing into mapped memory without room kills the process
                for at in range(0, nbytes, _LARGE):
                    write_exactly(self._fd, offset + at, memoryview(_ZEROS)[: nbytes - at])
            return self._mapped(offset, nbytes)

    def keep(self, tensor: Tensor) -> Tensor:
        """Move a tensor into the file, if it is large, contiguous and on the CPU; returns it."""
        if tensor.nbytes < _LARGE or not tensor.is_contiguous() or tensor.device.type != "cpu":
            return tensor
        with self._room(tensor.nbytes) as offset:
            write_exactly(self._fd, offset, memory(tensor.detach()))
            there = self._mapped(offset, tensor.nbytes)
        self.used(tensor.nbytes)
        return there.view(tensor.dtype).view(tensor.shape)

    @contextmanager
    def _room(self, nbytes: int) -> Iterator[int]:
        """The offset of the next bytes of the file. Raises OutputFailed if writing there fails."""
        try:
            yield self._size
        except OSError as error:
            raise OutputFailed(f"no room for {nbytes:,} bytes beside the output: {error.strerror or error}") from error
        self._size += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def _mapped(self, offset: int, nbytes: int) -> Tensor:
        self._maps.append(mmap.mmap(self._fd, nbytes, offset=offset))
        return torch.frombuffer(self._maps[-1], dtype=torch.uint8)

    def keep_all(self, value: Any) -> Any:
        """The same nested dict with its large tensors in the file."""
        if isinstance(value, dict):
            return {key: self.keep_all(inner) for key, inner in value.items()}
        return self.keep(value) if isinstance(value, torch.Tensor) else value

    def used(self, nbytes: int) -> None:
        """Count bytes of tensors that were read or written; now and then their memory is given back."""
        self._since += nbytes
        if self._since >= _BETWEEN:
            self.release()

    def release(self) -> None:
        """Give back the memory that using the tensors took; they are read again when they are used again."""
        self._since = 0
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
        if _TRIM is not None:
            _TRIM(0)

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._maps.clear()
        self._file.close()


class _Told(Protocol):
    def used(self, nbytes: int) -> None: ...


class Releasing:
    """A file to which tensors of a spill are written; the spill is told how many bytes were written."""

    def __init__(self, file: IO[bytes], spill: _Told) -> None:
        self._file, self._spill = file, spill

    def write(self, data: Any) -> int:
        """As of a file."""
        written = self._file.write(data)
        self._spill.used(written)
        return written

    def flush(self) -> None:
        """As of a file."""
        self._file.flush()
