"""Which combinations can be fused, and how parameters are divided into tiles. Pure arithmetic on shapes and formats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.errors import UsageError
from statecodec.kernels.curves import SOFTSIGN, SQRT, Curve
from statecodec.kernels.fused import Slot, StateStorage
from statecodec.kernels.triton import fast, sharing
from statecodec.kernels.triton.runtime import INTERPRETED, power_of_two
from statecodec.kernels.triton.tables import FIELDS, Form

# How many states each method keeps; sgd without momentum keeps none.
METHODS = {"adam": 2, "foam": 2, "lion": 1, "sgd": 1, "slim": 2}
WIDEST = 2048  # elements of the largest group that is fused
NARROW = 1 << 16  # parameters of more elements and rows shorter than half a group get a tile of their own shape
TILE, RUN = 1 << 14 if INTERPRETED else 1024, 4  # elements of a tile, tiles of a program, of the general step
_WORD_CURVES = (Curve("softsign", 8, True), Curve("sqrt", 8, False))
assert (_WORD_CURVES[0].kind, _WORD_CURVES[1].kind) == (SOFTSIGN, SQRT)


def supports(
    method: str, formats: Mapping[str, StateStorage | None], param: torch.dtype, low: torch.dtype | None
) -> bool:
    """Whether a fused step can do this combination; see `kernels.fused`."""
    return Traits.of(method, formats, param, low) is not None


@dataclass(frozen=True)
class Traits:
    """What the slots of a launch have in common."""

    method: str
    names: tuple[str, ...]
    formats: tuple[StateStorage, ...]
    group: int  # 0: no state is companded
    block: int  # of a folded state, else 1
    words: bool  # stored as the fast step requires, apart from shapes and addresses

    @staticmethod
    def of(
        method: str, formats: Mapping[str, StateStorage | None], param: torch.dtype, low: torch.dtype | None
    ) -> Traits | None:
        """The traits of a combination, or None if there is no fused step for it."""
        stored = tuple(f for f in formats.values() if f is not None)
        has_kernels = param in (torch.float32, torch.bfloat16, torch.float16) and low in (None, torch.int8, torch.int16)
        if method not in METHODS or not has_kernels or (low is not None and param == torch.float32):
            return None
        if len(stored) != len(formats) or len(stored) != METHODS[method] * bool(stored or method != "sgd"):
            return None
        groups, blocks = {f.group for f in stored if f.curve}, {f.block for f in stored}
        folded = blocks <= {0} if method != "foam" else len(blocks) == 1 and 0 not in blocks
        block = max(blocks, default=0) or 1
        if len(groups) > 1 or not folded or power_of_two(max(groups, default=1)) * block > WIDEST:
            return None
        dims = [f.dims for f in stored]
        shared = (
            method == "slim" and not dims[0] and dims[1] == tuple(range(dims[1][0], dims[1][-1] + 1) if dims[1] else ())
        )
        if any(dims) and not (shared and dims[1] and stored[1].curve is None):
            return None
        if method == "slim" and not dims[1]:
            return None
        words = method in ("adam", "lion", "sgd") and param == torch.bfloat16 and low == torch.int8 and bool(stored)
        curves = tuple(f.curve for f in stored)
        words = words and groups == {fast.GROUP} and curves == _WORD_CURVES[: len(stored)]
        return Traits(method, tuple(formats), stored, max(groups, default=0), block, words)

    @property
    def dims(self) -> tuple[int, ...] | None:
        """Along which dimensions the second moment is shared; None if it is not."""
        return self.formats[1].dims if self.method == "slim" else None

    @property
    def curves(self) -> list[Curve | None]:
        """Of the two states; None for a dense one, and where there is none."""
        return [*(f.curve for f in self.formats), None, None][:2]

    @cached_property
    def forms(self) -> tuple[Form, Form]:
        """The two states' forms."""
        padded = [*(Form.of(f.curve) for f in self.formats), Form(), Form()]
        return padded[0], padded[1]


@dataclass(frozen=True)
class Geometry:
    """Shapes and tiles of the parameters of a launch: columns of its table, one entry a slot."""

    traits: Traits
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    group: NDArray[np.int64]  # of a tile: the companded group, or a short row
    groups: NDArray[np.int64]
    whole: NDArray[np.bool_]  # groups tile the parameter's memory, and all its own addresses are aligned
    planes: NDArray[np.int64]  # [3, slots]: outer, shared, inner

    def parts(self, aligned: NDArray[np.bool_], words: bool) -> Iterator[tuple[dict[str, Any], NDArray[np.int32]]]:
        """The launches of a step if these gradients are aligned: for each, the tile fields of `Spec` and the chunks."""
        whole = self.whole & aligned
        # The fast step's last tile must end between groups; short rows are not groups of its size.
        even = (self.group == fast.GROUP) & (self.rows * self.cols % fast.GROUP == 0)
        fast_ones = whole & even & words & self.traits.words
        kinds = np.stack((fast_ones, whole, self.group), 1)
        for is_fast, is_whole, group in np.unique(kinds, axis=0).tolist():
            members = np.flatnonzero((kinds == (is_fast, is_whole, group)).all(1))
            width = power_of_two(group)
            count, run = (fast.COUNT, fast.RUN) if is_fast else (max(1, TILE // (width * self.traits.block)), RUN)
            chunks = cut(members, -(-self.groups[members] // (count * run)), run)
            if len(chunks):
                tile = {"group": group, "width": width, "count": count, "run": run}
                yield {"words": bool(is_fast), "whole": bool(is_whole), **tile}, chunks

    def sums(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Chunks of the sums behind shared second moments, and of the moments themselves."""
        outer, _, inner = self.planes
        every = np.arange(len(self.rows))
        programs = np.array([sharing.pieces(*plane)[0] for plane in self.planes.T.tolist()])
        return cut(every, programs, 1), cut(every, -(-(outer * inner) // sharing.VALUES), 1)

    @cached_property
    def scratch_ends(self) -> NDArray[np.int64]:
        """Where each parameter's partial sums end in scratch memory."""
        if self.traits.dims is None:
            return np.zeros(len(self.rows) + 1, np.int64)
        sizes = [
            outer * inner * sharing.pieces(outer, shared, inner)[1] for outer, shared, inner in self.planes.T.tolist()
        ]
        return np.cumsum([0, *sizes])

    @property
    def scratch(self) -> int:
        """Elements of scratch memory."""
        return int(self.scratch_ends[-1])

    def table(self, slots: Sequence[Slot], scratch: Tensor) -> NDArray[np.int64]:
        """The table of a launch: addresses, counters, shapes."""
        addresses = np.array([addresses_of(slot, self.traits) for slot in slots], np.int64).reshape(len(slots), -1).T
        index = np.array([slot.index for slot in slots])
        at = scratch.data_ptr() + 4 * self.scratch_ends[:-1]
        table = np.stack((*addresses, self.rows, self.cols, self.groups, index, *self.planes, at))
        assert len(table) == FIELDS
        return np.ascontiguousarray(table.astype(np.int64))


def geometry(traits: Traits, slots: Sequence[Slot]) -> Geometry:
    """The geometry of these slots."""
    views = np.array([_view(slot.shape, traits) for slot in slots], np.int64).reshape(-1, 2)
    rows, cols = views.T
    blocks = -(-cols // traits.block)
    group = np.array([_tile_group(int(r * c), int(b), traits) for r, c, b in zip(rows, cols, blocks, strict=True)])
    even = (cols % traits.block == 0) & (rows * blocks % 16 == 0) & (group == 1 << np.ceil(np.log2(group)).astype(int))
    aligned = np.array([all(a % 16 == 0 for a in addresses_of(slot, traits)[:6]) for slot in slots])
    planes = np.array([_planes(slot.shape, traits.dims) for slot in slots], np.int64).reshape(-1, 3).T
    whole = even & aligned & ((blocks % group == 0) | (rows == 1))
    return Geometry(traits, rows, cols, group, rows * -(-blocks // group), whole, planes)


def cut(slots: NDArray[np.int64], programs: NDArray[np.int64], step: int) -> NDArray[np.int32]:
    """[(slot, 0), (slot, step), ...]: as many as `programs` says, slot after slot."""
    at = np.repeat(slots, programs)
    begin = np.repeat(np.cumsum(programs) - programs, programs)
    return np.stack((at, (np.arange(len(at)) - begin) * step), 1).astype(np.int32)


def check_dense(slots: Sequence[Slot]) -> None:
    """Raise UsageError for dense states that are not fp32."""
    for slot in slots:
        for name, parts in slot.states.items():
            for part, tensor in parts.items():
                if part.endswith("data") and tensor.dtype != torch.float32:
                    raise UsageError(f"a fused step takes dense states in fp32, found {name} in {tensor.dtype}")


def addresses_of(slot: Slot, traits: Traits) -> list[int]:
    """Fields PARAM to SKIPPED of the table."""
    addresses = [slot.param.data_ptr(), 0 if slot.low is None else slot.low.data_ptr()]
    for name, stored in zip(traits.names, traits.formats, strict=True):
        parts, prefix = slot.states[name], "mean." if stored.block or stored.dims else ""
        addresses.append(parts[f"{prefix}{'codes' if stored.curve else 'data'}"].data_ptr())
        addresses.append(parts[f"{prefix}scales"].data_ptr() if stored.curve else 0)
    addresses += [0] * (6 - len(addresses))
    return [*addresses, slot.step.data_ptr(), slot.skipped.data_ptr()]


def _view(shape: tuple[int, ...], traits: Traits) -> tuple[int, int]:
    """Rows and columns to walk; where neither groups nor blocks end with a row, a parameter is one row."""
    rows, cols = (shape[0] if len(shape) > 1 else 1), math.prod(shape[1:] if len(shape) > 1 else shape)
    flat = not traits.group and traits.dims is None and cols % traits.block == 0
    return (1, rows * cols) if flat else (rows, cols)


def _tile_group(numel: int, blocks: int, traits: Traits) -> int:
    """The group size to tile a slot with; a row that is much shorter than a group is a group of its own."""
    if not traits.group:  # dense states have no groups: any tile will do
        return power_of_two(max(1, min(128, TILE // traits.block) + 1)) // 2
    short = 2 * blocks <= traits.group and numel >= NARROW
    return max(2, power_of_two(blocks)) if short else traits.group


def _planes(shape: tuple[int, ...], dims: tuple[int, ...] | None) -> tuple[int, int, int]:
    """(outer, shared, inner) of a shape, for consecutive shared dimensions."""
    if dims is None:
        return 0, 0, 0
    outer, shared, inner = shape[: dims[0]], shape[dims[0] : dims[-1] + 1], shape[dims[-1] + 1 :]
    return math.prod(outer), math.prod(shared), math.prod(inner)
