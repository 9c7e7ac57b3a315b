"""Which combinations can be fused, and how parameters are divided into tiles. Pure arithmetic on shapes and formats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from statecodec.errors import UsageError
from statecodec.kernels.curves import Curve
from statecodec.kernels.fused import Slot, StateStorage
from statecodec.kernels.triton import fast, general, sharing
from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton.runtime import DTYPES, INTERPRETED, power_of_two
from statecodec.kernels.triton.tables import Spec

METHODS = {"adam": (2,), "foam": (2,), "lion": (1,), "sgd": (0, 1), "slim": (2,)}  # how many states they may keep
LOW_BITS = {None: 0, torch.int8: 8, torch.int16: 16}
WIDEST = 2048  # elements of the largest group that is fused
TILE, RUN = 1 << 14 if INTERPRETED else 1024, 4  # elements of a tile, tiles of a program, of the general step
_IN_WORDS = (StateStorage(Curve("softsign", 8, True), fast.GROUP), StateStorage(Curve("sqrt", 8, False), fast.GROUP))


def supports(
    method: str, formats: Mapping[str, StateStorage | None], param: torch.dtype, low: torch.dtype | None
) -> bool:
    """Whether a fused step can do this combination; see `kernels.fused`."""
    return specified(method, formats, param, low) is not None


def specified(
    method: str, formats: Mapping[str, StateStorage | None], param: torch.dtype, low: torch.dtype | None
) -> Spec | None:
    """What is known of a combination before any step, or None if there is no fused step for it."""
    stored = tuple(state for state in formats.values() if state is not None)
    known = param in DTYPES and low in LOW_BITS and (low is None or param != torch.float32)
    if not known or len(stored) != len(formats) or len(stored) not in METHODS.get(method, ()):
        return None
    m, v = (*stored, None, None)[:2]
    groups, blocks = {state.group for state in stored if state.curve}, {state.block for state in stored}
    block, dims = max(blocks, default=0) or 1, v.dims if v else ()
    fits = len(groups) <= 1 and power_of_two(max(groups, default=1)) * block <= WIDEST
    fits = fits and (blocks == {block} if method == "foam" else blocks <= {0})
    fits = fits and not (m and m.dims) and bool(dims) == (method == "slim")
    if not fits or (v and dims and (v.curve or dims != tuple(range(dims[0], dims[-1] + 1)))):
        return None
    words = method in ("adam", "lion", "sgd") and (param, low) == (torch.bfloat16, torch.int8)
    # Dense states have no groups: any tile will do.
    group = max(groups, default=max(1, min(128, TILE // block)))
    return Spec(
        method=method, weight=DTYPES[param], low=LOW_BITS[low], m=m, v=v, block=block, group=group,
        width=power_of_two(group), words=words and bool(stored) and stored == _IN_WORDS[: len(stored)],
    )  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Shapes and tiles of the parameters of a launch, one entry a slot.

    `table` is that of the launch (see `tables`), whose SCRATCH counts from 0, up to `scratch` bytes. `whole`: groups
    tile the parameter's memory, and all its own addresses are aligned; `words`: it can be stepped in words.
    """

    spec: Spec
    table: NDArray[np.int64]
    whole: NDArray[np.bool_]
    words: NDArray[np.bool_]
    scratch: int

    @staticmethod
    def of(spec: Spec, slots: Sequence[Slot], states: Sequence[str]) -> Geometry:
        """The geometry of these slots."""
        addresses = np.array([_addresses(slot, states) for slot in slots], np.int64).T
        rows, cols = np.array([_view(slot.shape, spec) for slot in slots], np.int64).T
        planes = np.array([_planes(slot.shape, spec) for slot in slots], np.int64).T
        blocks = -(-cols // spec.block)
        sizes = [outer * inner * sharing.pieces(outer, shared, inner)[1] for outer, shared, inner in planes.T.tolist()]
        ends = 4 * np.cumsum([0, *sizes], dtype=np.int64)
        index = np.array([slot.index for slot in slots], np.int64)
        columns = (*addresses, rows, cols, rows * -(-blocks // spec.group), index, *planes, ends[:-1])
        even = (cols % spec.block == 0) & (rows * blocks % 16 == 0) & (spec.group == spec.width)
        whole = even & ((blocks % spec.group == 0) | (rows == 1)) & (addresses[:6] % 16 == 0).all(0)
        # The last tile in words must end between groups.
        return Geometry(
            spec, np.stack(columns, 1), whole, whole & spec.words & (rows * cols % fast.GROUP == 0), int(ends[-1])
        )

    def parts(self, spec: Spec, aligned: NDArray[np.bool_]) -> Iterator[tuple[Any, Spec, NDArray[np.int32]]]:
        """The launches of a step if these gradients are aligned: kernel, its record, its chunks.

        The step itself is one, unless parameters differ in their geometry.
        """
        if spec.shared:
            every, planes = np.arange(len(self.table)), self.table[:, t.OUTER : t.SCRATCH].tolist()
            yield sharing.squares, spec, cut(every, [sharing.pieces(*plane)[0] for plane in planes])
            yield sharing.share, spec, cut(every, [-(-outer * inner // sharing.VALUES) for outer, _, inner in planes])
        whole = self.whole & aligned
        words = self.words & aligned & (spec.gradient == tl.bfloat16 and not spec.stochastic)
        for in_words, is_whole in ((True, True), (False, True), (False, False)):
            members = np.flatnonzero((words == in_words) & (whole == is_whole))
            count, run = (fast.COUNT, fast.RUN) if in_words else (max(1, TILE // (spec.width * spec.block)), RUN)
            chunks = cut(members, -(-self.table[members, t.GROUPS] // (count * run)), run)
            if len(chunks):
                part = replace(spec, words=in_words, whole=is_whole, count=count, run=run)
                yield fast.step_words if in_words else general.step_elements, part, chunks


def cut(slots: NDArray[np.int64], programs: Any, step: int = 1) -> NDArray[np.int32]:
    """[(slot, 0), (slot, step), ...]: as many as `programs` says, slot after slot."""
    at = np.repeat(slots, programs)
    begin = np.repeat(np.cumsum(programs) - programs, programs)
    return np.stack((at, (np.arange(len(at)) - begin) * step), 1).astype(np.int32)


def _addresses(slot: Slot, states: Sequence[str]) -> list[int]:
    """Fields PARAM to SKIPPED of the table. Raises UsageError for dense states that are not fp32."""
    tensors: list[Tensor | None] = [slot.param, slot.low]
    for state in states:
        parts = {name.rpartition(".")[2]: tensor for name, tensor in slot.states[state].items()}
        dense = parts.get("data")
        if dense is not None and dense.dtype != torch.float32:
            raise UsageError(f"a fused step takes dense states in fp32, found {state} in {dense.dtype}")
        tensors += [parts.get("codes", dense), parts.get("scales")]
    tensors += [None] * (6 - len(tensors))
    return [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, slot.step, slot.skipped)]


def _view(shape: tuple[int, ...], spec: Spec) -> tuple[int, int]:
    """Rows and columns to walk; where neither groups nor blocks end with a row, a parameter is one row."""
    rows, cols = (shape[0] if len(shape) > 1 else 1), math.prod(shape[1:] if len(shape) > 1 else shape)
    flat = not spec.companded and not spec.shared and cols % spec.block == 0
    return (1, rows * cols) if flat else (rows, cols)


def _planes(shape: tuple[int, ...], spec: Spec) -> tuple[int, int, int]:
    """(outer, shared, inner) of a shape, for consecutive shared dimensions."""
    if spec.v is None or not spec.v.dims:
        return 0, 0, 0
    first, last = spec.v.dims[0], spec.v.dims[-1]
    return math.prod(shape[:first]), math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :])
