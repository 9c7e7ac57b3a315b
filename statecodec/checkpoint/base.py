"""An open checkpoint, compressed or not, behind one interface: its tensors, by name, streamed or whole."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from statecodec.checkpoint.joined import NamedTensor
from statecodec.checkpoint.report import Report
from statecodec.codecs import EncodedTensor, Encoding
from statecodec.dtypes import DType
from statecodec.errors import UsageError
from statecodec.layouts import Moments, Momentum, QuantisedMoments, View
from statecodec.layouts.objects import window
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    Args:
        name: Its key path.
        role: `weight`, `master`, `exp_avg`, `exp_avg_sq`, ... or `other`; `skeleton` for the bytes that are no tensor.
        param: The parameter that it belongs to, if that is known.
        shape: Its shape.
        dtype: Its dtype before it was encoded.
        index: Its place among the checkpoint's items.
    """

    name: str
    role: str
    param: str | None
    shape: tuple[int, ...]
    dtype: DType
    index: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes before it was encoded."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Window:
    """A tensor of the original files, as a window into a stored tensor.

    Args:
        view: The window.
        index: The stored tensor's place among the items.
    """

    view: View
    index: int


class Checkpoint(ABC):
    """An open checkpoint, compressed or not. Close it, or use it as a context manager.

    `items` are the stored tensors in order, skeletons of files included.
    """

    path: Path
    items: Sequence[TensorInfo]

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The items by name."""
        return {item.name: item for item in self.items}

    @property
    @abstractmethod
    def moments(self) -> tuple[Moments, ...]:
        """The pairs of exp_avg and exp_avg_sq, by name, with the settings of their optimizer."""

    @property
    def momenta(self) -> tuple[Momentum, ...]:
        """The momenta from which alone a weight's step follows; a compressed checkpoint does not say."""
        return ()

    @property
    def quantised(self) -> tuple[QuantisedMoments, ...]:
        """The pairs of Adam's moments that another package keeps quantised; a compressed checkpoint does not say."""
        return ()

    @cached_property
    def trained(self) -> frozenset[str | None]:
        """The weights that states of an optimizer train, with None if the weight of any is not known."""
        of_states = (self.moments, self.momenta, self.quantised)
        return frozenset(chain.from_iterable((state.weight for state in states) for states in of_states))

    @cached_property
    def lone_momenta(self) -> frozenset[str]:
        """Names of the first moments without a second one: momenta of SGD, Lion, Muon and Adafactor."""
        paired = {moments.exp_avg for moments in self.moments}
        return frozenset(i.name for i in self.items if i.role in ("momentum", "exp_avg") and i.name not in paired)

    @property
    @abstractmethod
    def listing(self) -> tuple[str, ...]:
        """Paths of the files and folders of a directory, relative to it; empty for a single file."""

    @property
    @abstractmethod
    def windows(self) -> Mapping[str, Window]:
        """Where the tensors of the original files are, under the names that those files give them."""

    @property
    @abstractmethod
    def joined(self) -> Mapping[str, NamedTensor]:
        """The tensors of the original that are stored in several items, by name."""

    @abstractmethod
    def stream(self, tensor: TensorInfo) -> Iterator[Tensor]:
        """Read one stored tensor in order, checked and decoded.

        Args:
            tensor: One of `items`.

        Returns:
            Flat tensors of the item's dtype, one chunk after the other.

        Raises:
            FormatError: If a compressed file is damaged.
            LayoutError: If an uncompressed one is.
        """

    @abstractmethod
    def elements(self, tensor: TensorInfo, start: int, stop: int) -> Tensor:
        """Read some elements of a stored tensor, checked and decoded.

        Args:
            tensor: One of `items`.
            start: The first element.
            stop: One past the last element.

        Returns:
            The elements, flat, in the item's dtype.

        Raises:
            FormatError: If a compressed file is damaged.
            LayoutError: If an uncompressed one is.
        """

    @abstractmethod
    def decode(self, index: int) -> Tensor:
        """Read one stored tensor whole, checked and decoded.

        Args:
            index: Its place in `items`.

        Returns:
            The tensor, in its own shape and dtype, on the CPU.

        Raises:
            FormatError: If a compressed file is damaged.
            LayoutError: If an uncompressed one is.
        """

    @abstractmethod
    def stored_as(self, index: int) -> Encoding:
        """How a stored tensor is stored.

        Args:
            index: Its place in `items`.

        Returns:
            Its codec, and the change since a base, if it is stored as one.
        """

    @abstractmethod
    def encoded(self, index: int) -> EncodedTensor:
        """Read one stored tensor in its encoded form.

        Args:
            index: Its place in `items`.

        Returns:
            Its codec and parts.

        Raises:
            UsageError: If the checkpoint is not compressed.
            FormatError: If the file is damaged.
        """

    @abstractmethod
    def report(self) -> Report:
        """What is in it, from its headers alone."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open. May be called more than once."""

    def names(self) -> list[str]:
        """Names of all tensors: key paths such as `optimizer.state.0.exp_avg`, `FILE:` before them in a directory.

        A tensor in several files (of a sharded checkpoint) has one name, without a file.
        """
        parts = {index for tensor in self.joined.values() for index, _ in tensor.pieces}
        return [*(name for name, w in self.windows.items() if w.index not in parts), *self.joined]

    def info(self, name: str) -> dict[str, Any]:
        """What is known of a tensor, from headers alone.

        Args:
            name: One of `names()`, or a name that reports use.

        Returns:
            A dict with `role`, `param`, `shape`, `dtype` (its name) and `codec` (its JSON config).

        Raises:
            UsageError: If there is no tensor of that name.
        """
        if name in self.joined:
            whole = self.joined[name]
            index, shape, dtype = whole.pieces[0][0], whole.shape, whole.dtype
        else:
            w = self._window(name)
            index, shape, dtype = w.index, w.view.shape, w.view.dtype
        tensor = self.items[index]
        return {
            "role": tensor.role, "param": tensor.param, "shape": shape, "dtype": dtype.name,
            "codec": self.stored_as(index).config(),
        }  # fmt: skip

    def read(self, name: str) -> Tensor:
        """Read one tensor, checked and decoded; touches only the bytes of that tensor.

        Args:
            name: One of `names()`, or a name that reports use.

        Returns:
            The tensor, in its own shape, stride and dtype, on the CPU.

        Raises:
            UsageError: If there is no tensor of that name.
            FormatError: If a compressed file is damaged.
            LayoutError: If an uncompressed one is.
        """
        if name in self.joined:
            return self.joined[name].assembled(self.decode)
        w = self._window(name)
        view, storage = w.view, self.decode(w.index).reshape(-1).view(torch.uint8)
        return window(storage, view.dtype, view.shape, view.stride, view.offset)

    def read_encoded(self, name: str) -> EncodedTensor:
        """Read one tensor in its encoded form.

        Args:
            name: One of `names()`, or a name that reports use.

        Returns:
            Its codec and parts.

        Raises:
            UsageError: If the checkpoint is not compressed, there is no tensor of that name, or it is stored in several
                pieces.
            FormatError: If the file is damaged.
        """
        if name in self.joined:
            first, *others = (self.items[index].name for index, _ in self.joined[name].pieces)
            raise UsageError(f"{name} is stored in pieces, each on its own: {first} and {len(others)} more")
        return self.encoded(self._window(name).index)

    def _window(self, name: str) -> Window:
        """Look a tensor up by its name in the original file, or by the name that reports use."""
        if name in self.windows:
            return self.windows[name]
        if name in self.tensors:
            first = self._first_windows.get(self.tensors[name].index)
            if first is not None:
                return first
        close = [n for n in (*self.windows, *self.joined) if name in n or n.endswith("." + name)][:3]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"{self.path} has no tensor {name!r}{hint}")

    @cached_property
    def _first_windows(self) -> Mapping[int, Window]:
        """For every item with tensors of the original in it, the first of them."""
        return {w.index: w for w in reversed(list(self.windows.values()))}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Elements:
    """A stream of elements that can be taken in pieces of any size, whatever the chunks' sizes."""

    def __init__(self, chunks: Iterator[Tensor]) -> None:
        self._chunks, self._rest = chunks, torch.empty(0, dtype=torch.float32, device="cpu")

    def take(self, count: int) -> Tensor:
        """The next `count` elements, flat, as fp32 (fp64 stays fp64)."""
        pieces, missing = [], count
        while missing:
            if not self._rest.numel():
                self._rest = _floats(next(self._chunks))
                continue
            pieces.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= pieces[-1].numel()
        return (
            pieces[0]
            if len(pieces) == 1
            else torch.cat(pieces)
            if pieces
            else torch.empty(0, dtype=torch.float32, device="cpu")
        )


def _floats(chunk: Tensor) -> Tensor:
    return chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.to(torch.float32)
