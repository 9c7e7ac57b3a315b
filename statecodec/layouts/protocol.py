"""The interface of a layout: how one framework or file format lays tensors out in files.

A layout is a module with these four names. It is asked about every folder of a directory (outermost first, with all the
files below it that no layout claimed yet) and about every single file; the first layout of the registry that claims
gets the files. It reads headers and pickles, never payload, and imports and runs nothing that a file names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from statecodec.layouts.base import LogicalTensor, SourceFile
from statecodec.layouts.listing import Listing
from statecodec.layouts.moments import Moments
from statecodec.layouts.payload import Payload
from statecodec.layouts.pickle.nodes import TensorNode


@dataclass(frozen=True)
class Claim:
    """What a layout answers when it recognises files.

    Args:
        files: Paths of the files of the listing that it will locate.
    """

    files: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What roles, names and moments of one file's tensors can be guessed from (see facts/), where files do not say.

    Args:
        path: Path of the file, or of the one that says what is in the others.
        root: The object graph (pickle/nodes.py).
        limit: How many tensors it may name.
        ordered: Its tensors are in the model's order (torch files; safetensors are sorted by name).
        scalars: Index of a one-element tensor -> its bytes: steps and learning rates are saved in such tensors.
        windows: For each tensor the nodes that look at it; every node has an index.
        shared: Positions of the tensors that several different windows look at: they are no weight and no moment as a
            whole.
    """

    path: str
    root: Any
    limit: int
    ordered: bool
    scalars: dict[int, bytes]
    windows: tuple[tuple[TensorNode, ...], ...]
    shared: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Located:
    """What a layout found in the files that it claimed.

    Args:
        files: One for each claimed file.
        tensors: Every region belongs to exactly one of them.
        moments: The pairs of Adam's moments that the files name for certain.
        facts: Of files whose tensors are to be named by guessing; `tensors` then begins with theirs, file by file.
        framework: What wrote the files, and how, as reports say it: "DeepSpeed ZeRO-2, 2 ranks".
    """

    files: tuple[SourceFile, ...]
    tensors: tuple[LogicalTensor, ...] = ()
    moments: tuple[Moments, ...] = ()
    facts: tuple[Facts, ...] = ()
    framework: str | None = None


def together(parts: Sequence[Located]) -> Located:
    """What was found in several files of one framework, with the tensors that facts name first, as the facts are."""
    described = [sum(len(facts.windows) for facts in located.facts) for located in parts]
    return Located(
        tuple(chain.from_iterable(located.files for located in parts)),
        (
            *chain.from_iterable(located.tensors[:n] for located, n in zip(parts, described, strict=True)),
            *chain.from_iterable(located.tensors[n:] for located, n in zip(parts, described, strict=True)),
        ),
        facts=tuple(chain.from_iterable(located.facts for located in parts)),
        framework=next((located.framework for located in parts if located.framework), None),
    )


class Layout(Protocol):
    """How one framework or file format lays tensors out in files: what the registry's rows provide."""

    @property
    def name(self) -> str:
        """Its name in SourceFile.layout and in reports."""
        ...

    def claims(self, listing: Listing) -> Claim | None:
        """Recognise files, by their names and first bytes.

        Args:
            listing: The files that no layout has claimed yet.

        Returns:
            The files that are of this layout; None if there are none.
        """
        ...

    def locate(self, listing: Listing) -> Located:
        """Locate the tensors of the claimed files.

        Args:
            listing: The claimed files.

        Returns:
            Files, tensors, moments, and what names can be guessed from.

        Raises:
            LayoutError: If a file is truncated, lying or hostile.
        """
        ...

    def tree(self, listing: Listing, read: Payload) -> Any:
        """The nested object that a user would have loaded from the claimed files.

        Args:
            listing: The claimed files; they may be the skeletons of compressed ones.
            read: Supplies the numbers: called with (path, offset, nbytes) it gives a 1-D uint8 tensor.

        Returns:
            The object.

        Raises:
            LayoutError: If a file is truncated, lying or hostile.
        """
        ...
