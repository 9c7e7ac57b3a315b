"""The interface of a layout: how one framework or file format lays tensors out in files.

A layout is a module with these four names. It is asked about every folder of a directory (outermost first, with all the
files below it that nobody claimed yet) and about every single file; the first layout of the registry that claims gets
the files. It reads headers and pickles, never payload, and nothing that a file names is imported or run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from statecodec.layouts.base import LogicalTensor, Moments, SourceFile
from statecodec.layouts.listing import Listing
from statecodec.layouts.pickle.nodes import TensorNode

if TYPE_CHECKING:
    from torch import Tensor

Read: TypeAlias = "Callable[[str, int, int], Tensor]"
"""(path, offset, nbytes) -> those bytes of a file as a 1-D uint8 tensor, writable and owned by the caller."""


@dataclass(frozen=True)
class KeptRead:
    """A Read whose caller says where tensors that a layout puts together shall be, too."""

    read: Read
    keep: Callable[[Tensor], Tensor]
    """A tensor -> the same values where they shall be."""

    def __call__(self, path: str, offset: int, nbytes: int) -> Tensor:
        return self.read(path, offset, nbytes)


def kept(read: Read, tensor: Tensor) -> Tensor:
    """A tensor that was put together from what `read` gave, where it shall be."""
    return read.keep(tensor) if isinstance(read, KeptRead) else tensor


@dataclass(frozen=True)
class Claim:
    """The files of a listing that a layout will locate, by path."""

    files: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What roles, names and moments of one file's tensors can be guessed from (see facts/), where files do not say."""

    path: str
    """Of the file, or of the one that says what is in the others."""
    root: Any
    """The object graph (pickle/nodes.py)."""
    limit: int
    """How many tensors it may name."""
    ordered: bool
    """Its tensors stand in the model's order (torch files; safetensors are sorted by name)."""
    scalars: dict[int, bytes]
    """Tensor's index -> bytes, of the one-element tensors: steps and learning rates are kept as such."""
    windows: tuple[tuple[TensorNode, ...], ...]
    """For each tensor the nodes that look at it; every node has an index."""
    shared: frozenset[int] = frozenset()
    """Positions of the tensors that several different windows look at: they are no weight and no moment as a whole."""


@dataclass(frozen=True)
class Located:
    """What a layout found in the files that it claimed."""

    files: tuple[SourceFile, ...]
    """One for each claimed file."""
    tensors: tuple[LogicalTensor, ...] = ()
    """Every region belongs to exactly one."""
    moments: tuple[Moments, ...] = ()
    facts: tuple[Facts, ...] = ()
    """Of files whose tensors are to be named by guessing; `tensors` then begins with theirs, file by file."""
    framework: str | None = None
    """What wrote the files, and how, as reports say it: "DeepSpeed ZeRO-2, 2 ranks"."""


class Layout(Protocol):
    """What the registry's rows provide."""

    @property
    def name(self) -> str:
        """As in SourceFile.layout and in reports."""
        ...

    def claims(self, listing: Listing) -> Claim | None:
        """The files that are of this layout, judged by names and heads; None if there are none."""
        ...

    def locate(self, listing: Listing) -> Located:
        """Locate the tensors of the claimed files. Raises LayoutError: truncated, lying or hostile."""
        ...

    def tree(self, listing: Listing, read: Read) -> Any:
        """The nested object that a user would have loaded from the claimed files.

        The listing's files may be the skeletons of compressed ones; payload comes from `read`. Raises LayoutError.
        """
        ...
