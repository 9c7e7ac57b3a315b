"""Flat tensors that hold parameters end to end: which parameters, and a file in which they are cut where those end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from statecodec.layouts.base import Run, Shape
from statecodec.layouts.graph import contiguous
from statecodec.layouts.listing import ListedFile
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.torch_zip import Archive


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of which parts are to be found in flat tensors."""

    name: str
    shape: Shape
    numel: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `run` of a parameter, which lie in a flat tensor from element `at` on."""

    param: Param
    run: Run
    at: int

    @property
    def shape(self) -> Shape:
        """The parameter's where it is all there; rows of it where the cuts are between rows; else flat."""
        numel, row = self.run.stop - self.run.start, math.prod(self.param.shape[1:])
        if numel == self.param.numel:
            return self.param.shape
        if len(self.param.shape) > 1 and row and self.run.start % row == 0 == self.run.stop % row:
            return (numel // row, *self.param.shape[1:])
        return (numel,)


@dataclass(frozen=True, slots=True)
class PartWindow:
    """A part of a tensor: a window in a file of its own."""

    path: str
    node: TensorNode
    run: Run


@dataclass
class FlatFile:
    """A torch file: where its storages are, and its objects, in which `cut` puts windows where flat tensors were."""

    file: ListedFile
    archive: Archive
    root: Any
    added: int = 0
    """Windows that were made here."""

    @property
    def path(self) -> str:
        """The file's path."""
        return self.file.path

    def cut(self, holder: Any, key: Any, node: TensorNode, fragments: Sequence[Fragment]) -> list[PartWindow]:
        """Replace a contiguous tensor in its list or dict by windows, one for each fragment."""
        windows = DictNode()
        parts = []
        for fragment in fragments:
            shape = fragment.shape
            window = TensorNode(node.storage, node.dtype, shape, contiguous(shape), node.offset + fragment.at)
            windows.items.append((fragment.param.name, window))
            parts.append(PartWindow(self.path, window, fragment.run))
        self.added += len(parts)
        if type(holder) is DictNode:
            holder.items = [(k, windows if k == key and v is node else v) for k, v in holder.items]
        else:
            holder[key] = windows
        return parts
