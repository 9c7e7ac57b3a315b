"""The host side of a fused step: which combinations there are, and the tables that tell a launch what to do.

What depends on shapes only (the schedule of work items) is made once per set of parameters and kept; the table of addresses is
written again when an address changed. A step in a steady training loop is a comparison of addresses and one launch.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.errors import UsageError
from statecodec.kernels.curves import DEFAULT_STEPS, Curve
from statecodec.kernels.fused import Hyper, Slot
from statecodec.kernels.triton import fused, runtime
from statecodec.kernels.triton.fused import FIELDS, MARKS
from statecodec.kernels.triton.runtime import INTERPRETED, OPTIONS, on, power_of_two

METHODS = {"adam": 2, "lion": 1, "sgd": 1}  # how many states each keeps; sgd without momentum keeps none
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW_BITS = {None: 0, torch.int8: 8, torch.int16: 16}
WIDEST = 2048  # elements of the largest group that is fused
NARROW = 1 << 16  # parameters of more elements and rows shorter than half a group get a tile of their own shape

# Elements of one tile, of one probe, and of gradient bytes probed ahead of the updates: enough to keep waits rare, few enough that
# the second read of a gradient finds it in the L2 cache.
UPDATE_TILE = 1 << 14 if INTERPRETED else 2048
PROBE_TILE, PROBE_CHUNKS = (1 << 14, 1) if INTERPRETED else (2048, 8)
AHEAD = 4 << 20

Format = tuple[Any, ...]
NONE: Format = (0,)
DENSE: Format = (1,)


def supports(
    method: str, formats: Mapping[str, dict[str, Any]], param: torch.dtype, low: torch.dtype | None
) -> bool:
    """Whether `step` can do this combination; see `kernels.fused`."""
    if method not in METHODS or param not in KINDS or low not in LOW_BITS or (low is not None and param == torch.float32):
        return False
    stateless = method == "sgd" and not formats
    groups = {c["group"] for c in formats.values() if c["name"] == "companded"}
    known = all(c["name"] in ("raw", "companded") for c in formats.values())
    return known and (stateless or len(formats) == METHODS[method]) and len(groups) < 2 and max(groups, default=0) <= WIDEST


def step(method: str, slots: Sequence[Slot], formats: Mapping[str, dict[str, Any]], hyper: Hyper) -> None:
    """One step of every slot, in place; the contract is `kernels.fused`. One launch, or one per gradient dtype and row width class.

    Does not synchronise. Raises BackendUnavailable for tensors that Triton cannot reach, UsageError for what `supports` refuses.
    """
    if not slots:
        return
    low = slots[0].low
    if not supports(method, formats, slots[0].param.dtype, None if low is None else low.dtype):
        raise UsageError(f"no fused {method} step for {slots[0].param.dtype} with {dict(formats)}; ask `supports` first")
    codecs = list(formats.values())
    curves = [_curve(c) for c in codecs] + [None] * (2 - len(codecs))
    group = max((c["group"] for c in codecs if c["name"] == "companded"), default=0)
    with on(slots[0].param):
        launches: dict[tuple[torch.dtype, int], list[Slot]] = {}
        for slot in slots:
            launches.setdefault((slot.grad.dtype, _group(slot, group)), []).append(slot)
        for (_, width), some in launches.items():
            plan = _plan(method, some, tuple(formats), curves, width, group > 0)
            plan.launch(some, hyper)


@dataclass
class Plan:
    """One launch, again and again: fixed parameters, changing addresses and scalars."""

    method: str
    names: tuple[str, ...]
    curves: list[Curve | None]
    formats: tuple[Format, Format]
    group: int
    views: list[tuple[int, int]]  # rows, cols of each slot
    device: torch.device
    schedule: Tensor = field(init=False)
    probes: list[int] = field(init=False)
    tickets: Tensor = field(init=False)
    marks: Tensor = field(init=False)
    addresses: list[list[int]] = field(default_factory=list)
    table: Tensor | None = None
    paths: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.width = power_of_two(self.group)
        self.count = max(1, UPDATE_TILE // self.width)
        sizes = [rows * cols for rows, cols in self.views]
        self.probes = [max(1, -(-n // (PROBE_TILE * PROBE_CHUNKS))) for n in sizes]
        updates = [-(-rows * -(-cols // self.group) // self.count) for rows, cols in self.views]
        items = np.concatenate(list(_schedule(self.probes, updates, [2 * n for n in sizes], AHEAD)))
        self.schedule = torch.from_numpy(items).to(self.device)
        self.tickets = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.marks = torch.zeros(len(sizes), MARKS.value, dtype=torch.int32, device=self.device)

    def launch(self, slots: Sequence[Slot], hyper: Hyper) -> None:
        # Only for the duration of the launch: memory of a CUDA stream is not reused before the work queued on it.
        grads = [slot.grad.contiguous() for slot in slots]
        self._address(slots, grads)
        first = slots[0]
        live = isinstance(hyper.lr, Tensor) and hyper.lr.device == self.device
        tables = [runtime.decode_table(c, self.device) if c else self.marks for c in self.curves]
        fused.step_group[(self.schedule.shape[0],)](
            self.tickets, self.schedule, self.table, self.marks, hyper.lr if live else self.marks, *tables,
            *(_bits(x) for x in (0.0 if live else float(hyper.lr), hyper.decay, hyper.beta1, hyper.beta2)),
            _bits(hyper.dampening), _bits(hyper.scale), hyper.seed & 0xFFFFFFFF,
            hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps, hyper.l2, hyper.momentum, hyper.residual,
            METHOD=self.method, KIND=KINDS[first.param.dtype], GRAD_KIND=KINDS[first.grad.dtype],
            LOW_BITS=LOW_BITS[None if first.low is None else first.low.dtype], M=self.formats[0], V=self.formats[1],
            GROUP=self.group, WIDTH=self.width, COUNT=self.count, PROBE_TILE=PROBE_TILE, PROBE_CHUNKS=PROBE_CHUNKS,
            PATHS=self.paths, LR_TENSOR=live, MAXIMIZE=hyper.maximize, L2=hyper.l2 != 0, NESTEROV=hyper.nesterov,
            STOCHASTIC=hyper.stochastic, DECAY_FIRST=hyper.decay_first, TORCH_BIAS=hyper.torch_bias, **OPTIONS,
        )  # fmt: skip

    def _address(self, slots: Sequence[Slot], grads: Sequence[Tensor]) -> None:
        """Bring the table of addresses up to date. Pinned and asynchronous, so that a CUDA graph can capture it."""
        addresses = [_addresses(s, g, self.names, self.formats) for s, g in zip(slots, grads, strict=True)]
        if addresses == self.addresses:
            return
        table = np.zeros((len(slots), FIELDS.value), np.int64)
        for at, (slot, pointers, (rows, cols)) in enumerate(zip(slots, addresses, self.views, strict=True)):
            whole = self.group == self.width and rows * cols % 16 == 0 and (cols % self.group == 0 or rows == 1)
            whole = whole and not any(p % 16 for p in pointers[:7])
            table[at] = (*pointers, rows, cols, self.probes[at], slot.index, whole)
        flat = table[:, fused.FLAT.value]
        self.paths = 1 * bool(flat.any()) | 2 * bool((flat == 0).any())
        host = torch.from_numpy(table)
        if self.device.type == "cuda":
            host = host.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self.kept.append(host)  # the graph will read it at every replay
        self.table = host.to(self.device, non_blocking=True)
        self.addresses = addresses


_PLANS: OrderedDict[Any, Plan] = OrderedDict()
_MOST_PLANS = 4096  # gradient release makes one per parameter


def _plan(
    method: str, slots: Sequence[Slot], names: tuple[str, ...], curves: list[Curve | None], group: int, companded: bool
) -> Plan:
    """The plan for these parameters; the address of a parameter's step counter tells it from others of its shape."""
    first = slots[0]
    low = None if first.low is None else first.low.dtype
    key = (
        method, names, *curves, group, first.param.device, first.param.dtype, low, first.grad.dtype,
        tuple((s.step.data_ptr(), s.shape) for s in slots),
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        formats = [_format(c) if at < len(names) else NONE for at, c in enumerate(curves)]
        views = [_rows_cols(s.shape) if companded else (1, s.param.numel()) for s in slots]
        plan = _PLANS[key] = Plan(method, names, curves, (formats[0], formats[1]), group, views, first.param.device)
        if len(_PLANS) > _MOST_PLANS:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(key)
    return plan


def _schedule(
    probes: Sequence[int], updates: Sequence[int], nbytes: Sequence[int], ahead: int
) -> Iterator[NDArray[np.int32]]:
    """Work items (slot, tile), probes as -1 - tile: every slot's probes, then, `ahead` probed bytes later, its updates."""

    def items(slot: int, tiles: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.stack((np.full_like(tiles, slot), tiles), -1)

    waiting: deque[int] = deque()
    probed = 0
    for slot in range(len(probes)):
        yield items(slot, -1 - np.arange(probes[slot], dtype=np.int32))
        waiting.append(slot)
        probed += nbytes[slot]
        while probed - nbytes[waiting[0]] >= ahead:
            done = waiting.popleft()
            probed -= nbytes[done]
            yield items(done, np.arange(updates[done], dtype=np.int32))
    for slot in waiting:
        yield items(slot, np.arange(updates[slot], dtype=np.int32))


def _addresses(slot: Slot, grad: Tensor, names: Sequence[str], formats: Sequence[Format]) -> list[int]:
    """Columns PARAM .. SKIPPED of the table."""
    found = [slot.param.data_ptr(), 0 if slot.low is None else slot.low.data_ptr(), grad.data_ptr()]
    for name, kind in zip(names, formats, strict=False):
        parts = slot.states[name]
        dense = kind == DENSE
        found += [parts["data" if dense else "codes"].data_ptr(), 0 if dense else parts["scales"].data_ptr()]
    found += [0] * (7 - len(found))
    return [*found, slot.step.data_ptr(), slot.skipped.data_ptr()]


def _group(slot: Slot, group: int) -> int:
    """The group size to tile this slot with; a row that is much shorter than a group is a group of its own."""
    if not group:
        return 128  # dense states have no groups: any tile will do
    cols = _rows_cols(slot.shape)[1]
    return group if 2 * cols > group or slot.param.numel() < NARROW else max(2, power_of_two(cols))


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


def _rows_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    cols = shape[-1] if shape else 1
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows, cols


def _bits(x: float) -> int:
    """The bits of a float64 as a signed integer: Triton would narrow a float argument to fp32."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])
