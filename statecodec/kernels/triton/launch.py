"""The host side of a fused step: what is prepared once for a group of parameters, and what is done at each step.

What depends on shapes and storage only (the table of addresses, the lists of chunks) is made once. At a step the
gradients' addresses and the group's numbers are compared with the last ones, and sent again where they changed, in one
asynchronous copy from pinned memory, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.errors import UsageError
from statecodec.kernels.fused import Hyper, Slot, StateStorage
from statecodec.kernels.triton import runtime, tables
from statecodec.kernels.triton.geometry import Geometry, specified
from statecodec.kernels.triton.runtime import DTYPES, OPTIONS, on
from statecodec.kernels.triton.tables import FLAGS, NUMBERS, SCALARS, Spec

_flags, _numbers = attrgetter(*FLAGS), attrgetter(*NUMBERS[1:])


def prepare(method: str, slots: Sequence[Slot], formats: Mapping[str, StateStorage | None]) -> TritonLaunch:
    """Prepare steps of these slots, which share method, formats and dtypes; the contract is `kernels.fused`.

    Raises BackendUnavailable for tensors that Triton cannot reach, UsageError for what `supports` refuses.
    """
    param, low = slots[0].param, slots[0].low
    spec = specified(method, formats, param.dtype, None if low is None else low.dtype)
    if spec is None:
        raise UsageError(f"no fused {method} step for {param.dtype} with {dict(formats)}; ask `supports` first")
    with on(param):
        return TritonLaunch(Geometry.of(spec, slots, list(formats)), param)


class TritonLaunch:
    """One step of a group of slots, each time it is called. Does not synchronise."""

    def __init__(self, geometry: Geometry, param: Tensor) -> None:
        self.geometry, self.param, self.device = geometry, param, param.device
        spec, self.count = geometry.spec, len(geometry.table)
        self.scratch = torch.zeros(geometry.scratch // 4, dtype=torch.float32, device=self.device)
        geometry.table[:, tables.SCRATCH] += self.scratch.data_ptr()
        self.table = self._there(geometry.table)
        self.scalars = torch.zeros(self.count, SCALARS.value, dtype=torch.float32, device=self.device)
        self.news = News(len(NUMBERS) + self.count, self.device)
        curves = (state.curve if state else None for state in (spec.m, spec.v))
        self.tables = [runtime.decode_table(curve, self.device) if curve else self.scalars for curve in curves]
        self.kept: dict[Any, list[tuple[Any, Spec, Tensor]]] = {}

    def __call__(self, gradients: Sequence[Tensor | None], hyper: Hyper) -> None:
        present, dtype = usable([g for g in gradients if g is not None])
        if not present:
            return
        live = isinstance(hyper.lr, Tensor) and hyper.lr.device == self.device
        *floats, seed = (0.0 if live else float(hyper.lr), *_numbers(hyper))
        news = np.zeros(len(NUMBERS) + self.count, np.int64)
        news.view(np.float64)[: len(floats)] = floats
        news[len(floats)] = seed & 0xFFFFFFFF
        addresses = news[len(NUMBERS) :]
        there = slice(None) if len(present) == self.count else [g is not None for g in gradients]
        addresses[there] = np.fromiter(map(Tensor.data_ptr, present), np.int64, len(present))
        with on(self.param):
            self.news.tell(news)
            tables.begin[(-(-self.count // tables.LANES.value),)](
                self.news.there, self.table, self.scalars, hyper.lr if live else self.scalars, self.count,
                METHOD=self.geometry.spec.method, LR_TENSOR=live, TORCH_BIAS=hyper.torch_bias, **OPTIONS,
            )  # fmt: skip
            for kernel, spec, chunks in self._parts(hyper, dtype, addresses & 15 == 0):
                kernel[(chunks.shape[0],)](
                    self.news.there, self.table, chunks, self.scalars, *self.tables, SPEC=spec, **OPTIONS
                )

    def _parts(self, hyper: Hyper, gradient: torch.dtype, aligned: NDArray[np.bool_]) -> list[tuple[Any, Spec, Tensor]]:
        """The launches after `begin`: kernel, its record, its chunks; made for each kind of step once."""
        flags = _flags(hyper)
        kind = gradient, hyper.l2 != 0, flags, aligned.tobytes()
        if kind not in self.kept:
            options = dict(zip(FLAGS, flags, strict=True))
            spec = replace(self.geometry.spec, gradient=DTYPES[gradient], l2=hyper.l2 != 0, **options)
            parts = self.geometry.parts(spec, aligned)
            self.kept[kind] = [(kernel, part, self._there(chunks)) for kernel, part, chunks in parts]
        return self.kept[kind]

    def _there(self, here: NDArray[Any]) -> Tensor:
        return torch.from_numpy(here).to(self.device)


class News:
    """A small array that changes from step to step, on the device.

    It goes through pinned memory, of which torch uses none again before the copy from it is done. What a CUDA graph
    copies from, at each replay, is kept; it comes from a few buffers in reserve, as none can be made in a capture.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.there = torch.zeros(size, dtype=torch.int64, device=device)
        self._cuda = device.type == "cuda"
        self._reserve = [self._pinned() for _ in range(4)] if self._cuda else []
        self._captured = list[Tensor]()
        self._told: NDArray[np.int64] = np.zeros(0, np.int64)

    def tell(self, here: NDArray[np.int64]) -> None:
        """Copy `here` to the device, without waiting for it, unless it is there.

        What is there is not known once there are graphs: each sends its own at every replay.
        """
        capturing = self._cuda and torch.cuda.is_current_stream_capturing()
        if capturing or self._captured or not np.array_equal(here, self._told):
            self._told = here
            self.send(here, capturing)

    def send(self, here: NDArray[np.int64], capturing: bool) -> None:
        """Copy `here` to the device; in a capture, at every replay."""
        source = torch.from_numpy(here)
        if capturing:
            self._captured.append(self._reserve.pop() if self._reserve else self._pinned())
            source = self._captured[-1].copy_(source)
        elif self._cuda:
            source = source.pin_memory()
        self.there.copy_(source, non_blocking=True)

    def _pinned(self) -> Tensor:
        return torch.zeros(self.there.shape, dtype=torch.int64, device="cpu", pin_memory=True)


def usable(gradients: list[Tensor]) -> tuple[list[Tensor], torch.dtype]:
    """The gradients as a kernel can read them: contiguous, and of one dtype, which is returned too.

    Others are copied. A copy need not outlive the launch: memory of a CUDA stream is not reused before the work
    queued on it.
    """
    dtypes = set(map(attrgetter("dtype"), gradients))
    if len(dtypes) > 1:
        gradients, dtypes = [g.float() for g in gradients], {torch.float32}
    if not all(map(Tensor.is_contiguous, gradients)):
        gradients = [g.contiguous() for g in gradients]
    return gradients, dtypes.pop() if dtypes else torch.float32
