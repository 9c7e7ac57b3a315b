"""What encodes chunks: the CPU, or a CUDA card. Both make the same bytes.

A card reads a chunk's values from pinned memory and writes its parts back there, on one stream per worker. There are
two workers for every core, which works as double buffering: while one waits for the card, another reads, packs or
writes.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from statecodec import codecs, dtypes, kernels
from statecodec.buffers import ThreadScratch
from statecodec.codecs import Codec
from statecodec.codecs.parts import Companions
from statecodec.elementwise import as_fp32, pieces, root
from statecodec.errors import BackendUnavailable, UsageError
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_scratch, _pinned = ThreadScratch(), ThreadScratch(pinned=True)
_WORTH = 8 << 30
"""Bytes of a source from which `auto` tries the card: its context and its kernels take seconds to make."""
_SAMPLE, _TRIES = 1 << 20, 3
Encoded = tuple[Mapping[str, "Tensor"], Comparison | None]


class Processor(Protocol):
    """Encodes chunks. Thread-safe. Results lie in the worker's scratch memory, valid until that worker's next chunk."""

    device: torch.device
    scratch: ThreadScratch
    """Where a chunk's values are read to."""

    def running(self) -> AbstractContextManager[None]:
        """When the block ends, all that was started on `device` in it is done."""

    def workers(self, threads: int) -> int:
        """How many workers keep `threads` cores busy."""

    def encode(self, codec: Codec, x: Tensor, companions: Companions, beside: Companions | None = None) -> Encoded:
        """Parts, and the error made (None: no error). Raises UnencodableValues.

        `beside`: the companions as the reader will have them, if they may be others.
        """

    def decoded(self, codec: Codec, x: Tensor) -> Tensor:
        """What `x` is after encoding and decoding; given to `encode` as a companion."""


class Cpu:
    """The kernels for CPUs."""

    scratch = _scratch

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def running(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def workers(self, threads: int) -> int:
        return threads

    def encode(self, codec: Codec, x: Tensor, companions: Companions, beside: Companions | None = None) -> Encoded:
        specs = codec.parts(tuple(x.shape), dtypes.of(x.dtype))
        parts = {name: self.scratch.take("part", s.dtype.torch, s.shape, name) for name, s in specs.items()}
        comparison = codec.encode_into(x, parts, kernels.host(), companions)
        if comparison is None and not codec.exact:
            decoded = self.scratch.take("decoded", x.dtype, tuple(x.shape))
            codec.decode_into(parts, decoded, kernels.host(), beside or companions)
            comparison = compared(codec, x, decoded, companions, beside)
        return parts, comparison

    def decoded(self, codec: Codec, x: Tensor) -> Tensor:
        return codec.encode(x).decode()


class Lane(threading.local):
    """A worker's own stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # While it waits, other threads can use the core.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """When the block ends, however it ends, all that was started on the card in it is done, in order."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._done.record(self._stream)
        self._done.synchronize()


class Cuda:
    """A CUDA card. Codecs whose bits depend on the device stay on the CPU."""

    scratch = _pinned

    def __init__(self, device: torch.device | None = None, lane: Any = Lane) -> None:
        """Raises BackendUnavailable without a card, or without triton."""
        if device is None:
            if not torch.cuda.is_available():
                raise BackendUnavailable(
                    "device cuda was asked for, but torch sees no CUDA device here; use --device cpu"
                )
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self._backend, self._cpu = device, kernels.get("triton"), Cpu()
        self._lane = lane(device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._lane.running():
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise BackendUnavailable(f"{self.device} has no room for a chunk; use --device cpu: {error}") from error

    def workers(self, threads: int) -> int:
        return 2 * threads

    def encode(self, codec: Codec, x: Tensor, companions: Companions, beside: Companions | None = None) -> Encoded:
        beside = beside or companions
        if not codec.portable:
            return self._cpu.encode(codec, x, _on(self._cpu.device, companions), _on(self._cpu.device, beside))
        specs = codec.parts(tuple(x.shape), dtypes.of(x.dtype))
        back = {name: self.scratch.take("part", s.dtype.torch, s.shape, name) for name, s in specs.items()}
        with self.running():
            values = x.to(self.device, non_blocking=True)
            companions, beside = _on(self.device, companions), _on(self.device, beside)
            parts = {name: torch.empty_like(part, device=self.device) for name, part in back.items()}
            comparison = codec.encode_into(values, parts, self._backend, companions)
            for name, part in parts.items():
                back[name].copy_(part, non_blocking=True)
            if comparison is None and not codec.exact:
                decoded = torch.empty_like(values)
                codec.decode_into(parts, decoded, self._backend, beside)
                comparison = compared(codec, values, decoded, companions, beside, self._backend)
        return back, comparison

    def decoded(self, codec: Codec, x: Tensor) -> Tensor:
        if not codec.portable:
            return self._cpu.decoded(codec, x)
        with self.running():
            return codec.encode(x.to(self.device, non_blocking=True), "triton").decode(backend="triton")


def _on(device: torch.device, tensors: Companions) -> Companions:
    return {role: tensor.to(device, non_blocking=True) for role, tensor in tensors.items()}


def compared(
    codec: Codec,
    x: Tensor,
    decoded: Tensor,
    companions: Companions,
    beside: Companions | None = None,
    backend: kernels.Backend | None = None,
) -> Comparison:
    """Sums of the error between values; for a direction, between update directions.

    `beside`: the companions of `decoded`, if they are others.
    """
    compare, total = (backend or kernels.host()).compare, NO_DIFFERENCE
    x, decoded = x.reshape(-1), decoded.reshape(-1)
    if not isinstance(codec, codecs.Direction):
        return compare(*(values if values.dtype == torch.float64 else as_fp32(values) for values in (x, decoded)))
    seconds = [moments["exp_avg_sq"].reshape(-1) for moments in (companions, beside or companions)]
    for piece in pieces(x):
        a, b = (values[piece] if values.dtype == torch.float64 else as_fp32(values[piece]) for values in (x, decoded))
        first, second = (root(values[piece].to(a.dtype)) + codec.eps for values in seconds)
        total = total.merged(compare(a / first, b / second))
    return total


def processor(device: str, nbytes: int, threads: int) -> Processor:
    """What encodes a source of `nbytes` on `threads` cores.

    `auto` is the CPU, unless the source is large, a card is there, and it was seen to be faster (`is_faster`).

    Raises UsageError for any other name, BackendUnavailable for "cuda" where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device!r}: expected auto, cpu or cuda")
    cpu = Cpu()
    if device == "cuda":
        return Cuda()
    if device == "cpu" or nbytes < _WORTH or "triton" not in kernels.available() or not torch.cuda.is_available():
        return cpu
    card = Cuda()
    return card if is_faster(card, cpu, threads) else cpu


def is_faster(card: Processor, cpu: Processor, threads: int) -> bool:
    """Whether a chunk goes to the card, is encoded and comes back in less time than all cores together need for it.

    It is measured now, with the codec that presets use most. Chunks overlap on the card, which is not counted.
    """
    codec = codecs.Uniform(step=1e-3)

    def seconds(which: Processor) -> float:
        x = which.scratch.take("source", torch.float32, (_SAMPLE,))
        x.copy_(torch.linspace(-1.0, 1.0, _SAMPLE, dtype=torch.float32, device="cpu"))
        best = math.inf
        for turn in range(_TRIES + 1):
            started = time.perf_counter()
            which.encode(codec, x, {})
            if turn:  # the first round compiles
                best = min(best, time.perf_counter() - started)
        return best

    return seconds(card) < seconds(cpu) / threads
