"""Kernels: pure functions on tensors, one name and one signature, one file per backend.

`reference` (torch ops) is the executable specification, `cpu` (numba) is what runs on a CPU, `triton` on a GPU.
Decoding is bit-exact across backends, and so is encoding. Choosing is explicit: a backend that is asked for and is not
there raises BackendUnavailable and says which ones are; nothing falls back silently.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

from statecodec.errors import BackendUnavailable
from statecodec.kernels.curves import Curve
from statecodec.kernels.grids import Grid, LogGrid
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from statecodec.kernels.reference.statistics import Comparison, Size, UpdateComparison, UpdateSize

# What an encoding kernel found in its input; it returns the bits, the codec raises.
NAN, INF, NEGATIVE, OUT_OF_RANGE = 1, 2, 4, 8


_TRUSTING: ContextVar[bool] = ContextVar("trusting", default=False)


@contextmanager
def trusting() -> Iterator[None]:
    """Within it, values are known to be encodable: nobody waits for a GPU to say what an encoder found."""
    token = _TRUSTING.set(True)
    try:
        yield
    finally:
        _TRUSTING.reset(token)


def trusted() -> bool:
    """Whether values are known to be encodable."""
    return _TRUSTING.get()


class Backend(Protocol):
    """The functions every backend module has. `x` and `out` are contiguous; 2-D is rows x cols; floats are fp32."""

    def encode_companded(
        self, x: Tensor, codes: Tensor, scales: Tensor, *, curve: Curve, bits: int, group: int
    ) -> int: ...

    def decode_companded(
        self, codes: Tensor, scales: Tensor, out: Tensor, *, curve: Curve, bits: int, group: int
    ) -> None: ...

    def encode_split(self, x: Tensor, high: Tensor, low: Tensor) -> int: ...

    def decode_split(self, high: Tensor, low: Tensor, out: Tensor) -> None: ...

    def encode_uniform(self, x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]: ...

    def decode_uniform(self, codes: Tensor, out: Tensor, *, grid: Grid) -> None: ...

    def encode_direction(
        self, m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float
    ) -> tuple[int, Comparison]: ...

    def decode_direction(self, codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None: ...

    def encode_logarithmic(self, x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]: ...

    def decode_logarithmic(self, codes: Tensor, out: Tensor, *, grid: LogGrid) -> None: ...

    def fold_mean(self, x: Tensor, out: Tensor, *, block: int) -> int: ...

    def unfold(self, mean: Tensor, out: Tensor, *, block: int) -> None: ...

    def compare(self, a: Tensor, b: Tensor) -> Comparison: ...


class HostBackend(Backend, Protocol):
    """What the backends for CPU tensors have besides: the sums that whole checkpoints are compared by."""

    def compare_updates(
        self,
        m: Tensor,
        v: Tensor,
        m_other: Tensor,
        v_other: Tensor,
        *,
        correction1: float,
        correction2: float,
        eps: float,
    ) -> UpdateComparison: ...

    def size(self, x: Tensor) -> Size: ...

    def update_size(self, m: Tensor, v: Tensor, *, eps: float) -> UpdateSize: ...


BACKENDS = {"reference": (), "cpu": ("numba",), "triton": ("triton",)}


def available() -> list[str]:
    """Names of the backends whose packages are installed."""
    return [name for name, needs in BACKENDS.items() if all(importlib.util.find_spec(n) for n in needs)]


@cache
def get(name: str) -> Backend:
    """The backend of that name. Raises BackendUnavailable."""
    if name not in BACKENDS:
        raise BackendUnavailable(f"no kernel backend {name!r}; there are {', '.join(BACKENDS)}")
    if name not in available():
        need = " and ".join(BACKENDS[name])
        raise BackendUnavailable(
            f"backend {name!r} needs {need}, which is not installed; available: {', '.join(available())}"
        )
    return cast(Backend, importlib.import_module(f"statecodec.kernels.{name}"))


def host() -> HostBackend:
    """The fast backend for CPU tensors."""
    return cast(HostBackend, get("cpu"))


def resolve(name: str | None, device: torch.device) -> Backend:
    """The named backend, or the fast one for a device: `triton` on cuda, `cpu` otherwise."""
    return get(name or ("triton" if device.type == "cuda" else "cpu"))
