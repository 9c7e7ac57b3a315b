"""The host side of a fused step: which combinations there are, and the tables that tell a launch what to do.

What depends on shapes only (the schedule of work items) is made once per set of parameters and kept; the table of
addresses is written again when an address changed. A step in a steady training loop is a comparison of addresses and
one launch.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from statecodec.errors import UsageError
from statecodec.kernels.curves import DEFAULT_STEPS, Curve
from statecodec.kernels.fused import Hyper, Slot
from statecodec.kernels.triton import fused, runtime
from statecodec.kernels.triton.runtime import INTERPRETED, OPTIONS, on, power_of_two
from statecodec.kernels.triton.schedule import BROAD, HIGH, TALL, WIDE, pieces, planes, rows_cols, schedule
from statecodec.kernels.triton.updates import FIELDS, FLAT, MARKS

# How many states each method keeps; sgd without momentum keeps none.
METHODS = {"adam": 2, "foam": 2, "lion": 1, "sgd": 1, "slim": 2}
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW_BITS = {None: 0, torch.int8: 8, torch.int16: 16}
WIDEST = 2048  # elements of the largest group that is fused
NARROW = 1 << 16  # parameters of more elements and rows shorter than half a group get a tile of their own shape

# Elements of one tile (a work item is a run of RUN of them), of one probe, and of gradient bytes probed ahead of the
# updates: enough to keep waits rare, few enough that the second read of a gradient finds it in the L2 cache.
UPDATE_TILE = 1 << 14 if INTERPRETED else 1024
PROBE_TILE, PROBE_CHUNKS = (1 << 14, 1) if INTERPRETED else (2048, 4)
AHEAD = 4 << 20
WARPS, RUN = 4, 4

Format = tuple[Any, ...]
NONE: Format = (0,)
DENSE: Format = (1,)
SHARED: Format = (3,)


def supports(method: str, formats: Mapping[str, dict[str, Any]], param: torch.dtype, low: torch.dtype | None) -> bool:
    """Whether `step` can do this combination; see `kernels.fused`."""
    if method not in METHODS or param not in KINDS or low not in LOW_BITS or (low and param == torch.float32):
        return False
    if len(formats) != METHODS[method] and not (method == "sgd" and not formats):
        return False
    inner = [_inner(method, at, config) for at, config in enumerate(formats.values())]
    if not all(c is not None and c["name"] in ("raw", "companded") for c in inner):
        return False
    groups = {c["group"] for c in inner if c is not None and c["name"] == "companded"}
    blocks = {c.get("level", 0) for c in formats.values()} if method == "foam" else {0}
    fits = len(groups) < 2 and len(blocks) == 1 and power_of_two(max(groups, default=1)) << max(blocks) <= WIDEST
    return fits and (method != "slim" or _contiguous(list(formats.values())[1]["dims"]))


def step(method: str, slots: Sequence[Slot], formats: Mapping[str, dict[str, Any]], hyper: Hyper) -> None:
    """One step of every slot, in place; the contract is `kernels.fused`. One launch, or one per gradient dtype and row
    width class.

    Does not synchronise. Raises BackendUnavailable for tensors that Triton cannot reach, UsageError for what `supports`
    refuses.
    """
    if not slots:
        return
    low, dtype = slots[0].low, slots[0].param.dtype
    if not supports(method, formats, dtype, None if low is None else low.dtype):
        raise UsageError(f"no fused {method} step for {dtype} with {dict(formats)}; ask `supports` first")
    codecs = list(formats.values())
    inner = [_inner(method, at, c) for at, c in enumerate(codecs)]
    curves = [None if c is None else _curve(c) for c in inner] + [None] * (2 - len(codecs))
    group = max((c["group"] for c in inner if c is not None and c["name"] == "companded"), default=0)
    traits = Traits(
        method, tuple(formats), tuple(curves), group, 1 << codecs[0]["level"] if method == "foam" else 1,
        tuple(codecs[1]["dims"]) if method == "slim" else None,
    )  # fmt: skip
    with on(slots[0].param):
        launches: dict[tuple[torch.dtype, int], list[Slot]] = {}
        for slot in slots:
            launches.setdefault((slot.grad.dtype, _tile_group(slot, traits)), []).append(slot)
        for (_, tile_group), some in launches.items():
            _plan(traits, some, tile_group).launch(some, hyper)


@dataclass(frozen=True)
class Traits:
    """What the slots of a launch have in common, apart from dtypes."""

    method: str
    names: tuple[str, ...]
    curves: tuple[Curve | None, ...]  # of the two states; None: dense, or no state
    group: int  # 0: no state is companded
    block: int  # of a folded state, else 1
    dims: tuple[int, ...] | None  # of a shared second moment

    @property
    def formats(self) -> tuple[Format, Format]:
        first, second = (_format(c) if at < len(self.names) else NONE for at, c in enumerate(self.curves))
        return first, SHARED if self.dims is not None else second

    def view(self, slot: Slot) -> tuple[int, int]:
        """Rows and columns to walk; where neither groups nor blocks end with a row, a parameter is one row."""
        rows, cols = rows_cols(slot.shape)
        flat = not self.group and self.dims is None and cols % self.block == 0
        return (1, rows * cols) if flat else (rows, cols)


class Plan:
    """One launch, again and again: fixed parameters, changing addresses and scalars."""

    def __init__(self, traits: Traits, slots: Sequence[Slot], group: int) -> None:
        device = slots[0].param.device
        for slot in slots:
            for name, parts in slot.states.items():
                dense = next((x for k, x in parts.items() if k.endswith("data")), None)
                if dense is not None and dense.dtype != torch.float32:
                    raise UsageError(f"a fused step takes dense states in fp32, found {name} in {dense.dtype}")
        self.traits, self.device, self.group, self.width = traits, device, group, power_of_two(group)
        self.count = max(1, UPDATE_TILE // (self.width * traits.block))
        self.views = [traits.view(s) for s in slots]
        sizes = [rows * cols for rows, cols in self.views]
        blocks = [(rows, -(-cols // traits.block)) for rows, cols in self.views]
        self.tiles = [-(-rows * -(-cols // group) // self.count) for rows, cols in blocks]
        updates = [-(-tiles // RUN) for tiles in self.tiles]
        self.run = RUN
        self.planes = [planes(s.shape, traits.dims) for s in slots]
        cuts = [pieces(*view) for view in self.planes]
        plain = [max(1, -(-n // (PROBE_TILE * PROBE_CHUNKS))) for n in sizes]
        self.probes = plain if traits.dims is None else [probes for probes, _ in cuts]
        ends = np.cumsum([0, *(scratch for _, scratch in cuts)]) if traits.dims is not None else np.zeros(1, np.int64)
        self.scratch = torch.zeros(int(ends[-1]), dtype=torch.float32, device=device)
        self.scratch_at = [int(n) for n in ends[:-1]] if traits.dims is not None else [0] * len(slots)
        items = np.concatenate(list(schedule(self.probes, updates, [2 * n for n in sizes], AHEAD)))
        self.schedule = torch.from_numpy(items).to(device)
        self.tickets = torch.zeros(1, dtype=torch.int64, device=device)
        self.marks = torch.zeros(len(slots), MARKS.value, dtype=torch.int32, device=device)
        self.addresses: list[list[int]] = []
        self.table, self.paths = self.marks, 0
        self.kept: list[Tensor] = []

    def launch(self, slots: Sequence[Slot], hyper: Hyper) -> None:
        # Only for the duration of the launch: memory of a CUDA stream is not reused before the work queued on it.
        grads = [slot.grad.contiguous() for slot in slots]
        self._address(slots, grads)
        first = slots[0]
        live = isinstance(hyper.lr, Tensor) and hyper.lr.device == self.device
        tables = [runtime.decode_table(c, self.device) if c else self.marks for c in self.traits.curves]
        fused.step_group[(self.schedule.shape[0],)](
            self.tickets, self.schedule, self.table, self.marks, hyper.lr if live else self.marks, *tables,
            *(_bits(x) for x in (0.0 if live else float(hyper.lr), hyper.decay, hyper.beta1, hyper.beta2)),
            _bits(hyper.dampening), _bits(hyper.scale), hyper.seed & 0xFFFFFFFF,
            hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps, hyper.l2, hyper.momentum,
            hyper.residual, METHOD=self.traits.method, KIND=KINDS[first.param.dtype], GRAD_KIND=KINDS[first.grad.dtype],
            LOW_BITS=LOW_BITS[None if first.low is None else first.low.dtype], M=self.traits.formats[0],
            V=self.traits.formats[1],
            GROUP=self.group, WIDTH=self.width, COUNT=self.count, BLOCK=self.traits.block, RUN=self.run,
            PROBE_TILE=PROBE_TILE, PROBE_CHUNKS=PROBE_CHUNKS, HIGH=HIGH, WIDE=WIDE, TALL=TALL, BROAD=BROAD,
            PATHS=self.paths, LR_TENSOR=live, MAXIMIZE=hyper.maximize, L2=hyper.l2 != 0, NESTEROV=hyper.nesterov,
            STOCHASTIC=hyper.stochastic, MEAN_OF_SQUARES=hyper.mean_of_squares, TRUE_TAIL=hyper.true_tail,
            DECAY_FIRST=hyper.decay_first, TORCH_BIAS=hyper.torch_bias,
            **(OPTIONS | {"num_warps": WARPS}),
        )  # fmt: skip

    def _address(self, slots: Sequence[Slot], grads: Sequence[Tensor]) -> None:
        """Bring the table of addresses up to date. Pinned and asynchronous, so that a CUDA graph can capture it."""
        addresses = [_addresses(s, g, self.traits) for s, g in zip(slots, grads, strict=True)]
        if addresses == self.addresses:
            return
        table = np.zeros((len(slots), FIELDS.value), np.int64)
        for at, (slot, pointers, (rows, cols)) in enumerate(zip(slots, addresses, self.views, strict=True)):
            scratch = self.scratch.data_ptr() + 4 * self.scratch_at[at]
            whole = self._whole(rows, cols) and not any(p % 16 for p in pointers[:7])
            table[at] = (
                *pointers,
                rows,
                cols,
                self.probes[at],
                self.tiles[at],
                slot.index,
                whole,
                *self.planes[at],
                scratch,
            )
        flat = table[:, FLAT.value]
        self.paths = 1 * bool(flat.any()) | 2 * bool((flat == 0).any())
        host = torch.from_numpy(table)
        host = host.pin_memory() if self.device.type == "cuda" else host
        self.table = host.to(self.device, non_blocking=True)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept += [host, self.table]  # the graph reads both at every replay
        self.addresses = addresses

    def _whole(self, rows: int, cols: int) -> bool:
        """Whether groups (and blocks) tile the parameter's memory, so that rows do not matter."""
        blocks = cols // self.traits.block
        even = cols % self.traits.block == 0 and rows * blocks % 16 == 0
        return even and self.group == self.width and (blocks % self.group == 0 or rows == 1)


_PLANS: OrderedDict[Any, Plan] = OrderedDict()
_MOST_PLANS = 4096  # gradient release makes one per parameter


def _plan(traits: Traits, slots: Sequence[Slot], group: int) -> Plan:
    """The plan for these parameters; the address of a parameter's step counter tells it from others of its shape."""
    first = slots[0]
    low = None if first.low is None else first.low.dtype
    key = (
        traits, group, first.param.device, first.param.dtype, low, first.grad.dtype,
        tuple((s.step.data_ptr(), s.shape) for s in slots),
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = Plan(traits, slots, group)
        if len(_PLANS) > _MOST_PLANS:
            oldest = next((k for k, p in _PLANS.items() if not p.kept), None)
            _PLANS.pop(oldest, None)
    _PLANS.move_to_end(key)
    return plan


def _addresses(slot: Slot, grad: Tensor, traits: Traits) -> list[int]:
    """Columns PARAM .. SKIPPED of the table."""
    found = [slot.param.data_ptr(), 0 if slot.low is None else slot.low.data_ptr(), grad.data_ptr()]
    foam, slim = traits.method == "foam", traits.method == "slim"
    prefix = ("mean." if foam else "", "mean." if foam or slim else "")
    for name, curve, before in zip(traits.names, traits.curves, prefix, strict=False):
        parts = slot.states[name]
        found.append(parts[f"{before}{'codes' if curve else 'data'}"].data_ptr())
        found.append(parts[f"{before}scales"].data_ptr() if curve else 0)
    found += [0] * (7 - len(found))
    return [*found, slot.step.data_ptr(), slot.skipped.data_ptr()]


def _tile_group(slot: Slot, traits: Traits) -> int:
    """The group size to tile this slot with; a row that is much shorter than a group is a group of its own."""
    if not traits.group:  # dense states have no groups: any tile will do
        return max(1, min(128, UPDATE_TILE // traits.block))
    blocks = -(-rows_cols(slot.shape)[1] // traits.block)
    short = 2 * blocks <= traits.group and slot.param.numel() >= NARROW
    return max(2, power_of_two(blocks)) if short else traits.group


def _contiguous(dims: Sequence[int]) -> bool:
    return list(dims) == list(range(dims[0], dims[-1] + 1))


def _inner(method: str, at: int, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The codec of a state's values where the method expects it: inside a fold for FOAM, inside a share for SlimAdam's
    second."""
    if method == "foam":
        return cast(Mapping[str, Any], config["inner"]) if config["name"] == "folded" else None
    if method == "slim" and at == 1:
        dense = config["name"] == "shared" and config["inner"]["name"] == "raw"
        return cast(Mapping[str, Any], config["inner"]) if dense else None
    return config


def _curve(config: Mapping[str, Any]) -> Curve | None:
    if config["name"] != "companded":
        return None
    name, bits = config["curve"], config["bits"]
    return Curve(name, bits, name in ("softsign", "linear"), config["steps"] or DEFAULT_STEPS[bits])


def _format(curve: Curve | None) -> Format:
    """The compile-time description of a state that `triton.steps` reads."""
    if curve is None:
        return DENSE
    return (
        2, curve.bits, curve.kind, curve.top, curve.signed, curve.min_scale, curve.steps, float(curve.levels[1]) * 0.5,
    )  # fmt: skip


def _bits(x: float) -> int:
    """The bits of a float64 as a signed integer: Triton would narrow a float argument to fp32."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])
