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
    """Within the block, values are known to be encodable, so no encoder waits for a GPU to report its flags."""
    token = _TRUSTING.set(True)
    try:
        yield
    finally:
        _TRUSTING.reset(token)


def trusted() -> bool:
    """Whether values are known to be encodable."""
    return _TRUSTING.get()


class Backend(Protocol):
    """The functions that every backend has.

    All tensors are contiguous and on the backend's device; those that are written are allocated by the caller. Floats
    are fp32 unless stated. An encoder returns flags of what it could not encode: bits of NAN, INF, NEGATIVE and
    OUT_OF_RANGE, 0 for nothing. The specification is `statecodec.kernels.reference`.
    """

    def encode_companded(self, x: Tensor, codes: Tensor, scales: Tensor, *, curve: Curve, group: int) -> int:
        """Quantise groups of values along each row.

        Args:
            x: fp32, rows x cols.
            codes: Written: int8 (signed curves of 8 bits) or uint8; rows x cols, or rows x ceil(cols / 2) with two
                4-bit codes a byte, low nibble first.
            scales: Written: bf16, rows x ceil(cols / group).
            curve: The companding curve.
            group: Values per scale.

        Returns:
            The flags.
        """

    def decode_companded(self, codes: Tensor, scales: Tensor, out: Tensor, *, curve: Curve, group: int) -> None:
        """The inverse of `encode_companded`: one table look-up and one fp32 multiplication per element.

        Args:
            codes: As written.
            scales: As written.
            out: Written: fp32, rows x cols.
            curve: The companding curve.
            group: Values per scale.
        """

    def encode_split(self, x: Tensor, high: Tensor, low: Tensor) -> int:
        """Split values into a 16-bit float and what it lacks, in integer arithmetic.

        Args:
            x: fp32, flat.
            high: Written: bf16 or fp16, of the same shape.
            low: Written: int8 or int16, of the same shape.

        Returns:
            The flags.
        """

    def decode_split(self, high: Tensor, low: Tensor, out: Tensor) -> None:
        """The inverse of `encode_split`.

        Args:
            high: As written.
            low: As written.
            out: Written: fp32, flat.
        """

    def encode_uniform(self, x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
        """Number values on a uniform grid.

        Args:
            x: fp32, flat.
            codes: Written: int32, flat.
            grid: The grid.

        Returns:
            The flags, and the sums of x against what its codes decode to.
        """

    def decode_uniform(self, codes: Tensor, out: Tensor, *, grid: Grid) -> None:
        """The inverse of `encode_uniform`. Any codes give finite values.

        Args:
            codes: int32, flat.
            out: Written: fp32, flat.
            grid: The grid.
        """

    def encode_direction(
        self, m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float
    ) -> tuple[int, Comparison]:
        """Number u = m / (sqrt(v) + eps) on a uniform grid.

        Args:
            m: First moment: fp32, flat.
            v: Second moment of the same elements: fp32, flat.
            codes: Written: int32, flat.
            grid: The grid, in units of u.
            eps: What is added to the root, rounded to fp32.

        Returns:
            The flags, and the sums of u against what its codes decode to.
        """

    def decode_direction(self, codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
        """The inverse of `encode_direction`, with the second moment that the reader has.

        Args:
            codes: int32, flat.
            v: Second moment: fp32, flat.
            out: Written: the first moment, fp32, flat, finite.
            grid: The grid, in units of u.
            eps: As when encoding.
        """

    def encode_logarithmic(self, x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]:
        """Number values that are not negative on a logarithmic grid.

        Args:
            x: fp32, flat.
            codes: Written: int16, flat; 0 for zeros, at least 1 for anything positive.
            grid: The grid.

        Returns:
            The flags, and the sums of x against what its codes decode to.
        """

    def decode_logarithmic(self, codes: Tensor, out: Tensor, *, grid: LogGrid) -> None:
        """The inverse of `encode_logarithmic`: one table look-up per element.

        Args:
            codes: int16, flat; those outside the grid decode as its ends.
            out: Written: fp32, flat.
            grid: The grid.
        """

    def fold_mean(self, x: Tensor, out: Tensor, *, block: int) -> int:
        """Means of neighbours in a row.

        Args:
            x: fp32, rows x cols.
            out: Written: fp32, rows x ceil(cols / block).
            block: Values per mean, a power of two; a short tail is divided by its own length.

        Returns:
            The flags.
        """

    def unfold(self, mean: Tensor, out: Tensor, *, block: int) -> None:
        """Repeat every mean over its block.

        Args:
            mean: fp32, rows x ceil(cols / block).
            out: Written: fp32, rows x cols.
            block: Values per mean.
        """

    def compare(self, a: Tensor, b: Tensor) -> Comparison:
        """Sum up how two tensors differ.

        Args:
            a: The original, flat: fp32 or fp64.
            b: The other, of the same dtype and size.

        Returns:
            Sums in fp64.
        """


class HostBackend(Backend, Protocol):
    """What the backends for CPU tensors have in addition: the sums by which whole checkpoints are compared."""

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
    ) -> UpdateComparison:
        """Sum up how two Adam updates u = (m / correction1) / (sqrt(v / correction2) + eps) differ.

        Args:
            m: First moment of the original: fp32, flat.
            v: Second moment of the original: fp32, flat.
            m_other: First moment of the other.
            v_other: Second moment of the other.
            correction1: 1 - beta1**t.
            correction2: 1 - beta2**t.
            eps: What is added to the root.

        Returns:
            Sums in fp64.
        """

    def size(self, x: Tensor) -> Size:
        """Sum up how large the finite values of a tensor are.

        Args:
            x: fp32, flat.

        Returns:
            Sums in fp64.
        """

    def update_size(self, m: Tensor, v: Tensor, *, eps: float) -> UpdateSize:
        """Sum up how large u = m / (sqrt(v) + eps) is.

        Args:
            m: First moment: fp32, flat.
            v: Second moment: fp32, flat.
            eps: What is added to the root.

        Returns:
            The number of elements that have an update, and their sum of squares, in fp64.
        """


BACKENDS = {"reference": (), "cpu": ("numba",), "triton": ("triton",)}


def available() -> list[str]:
    """Names of the backends whose packages are installed."""
    return [name for name, needs in BACKENDS.items() if all(importlib.util.find_spec(n) for n in needs)]


@cache
def get(name: str) -> Backend:
    """Look up a backend.

    Args:
        name: `reference`, `cpu` or `triton`.

    Returns:
        The backend's module.

    Raises:
        BackendUnavailable: If there is none of that name, or its packages are not installed.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"no kernel backend {name!r}; there are {', '.join(BACKENDS)}")
    if name not in available():
        need = " and ".join(BACKENDS[name])
        raise BackendUnavailable(
            f"backend {name!r} needs {need}, which is not installed; available: {', '.join(available())}"
        )
    return cast(Backend, importlib.import_module(f"statecodec.kernels.{name}"))


def host() -> HostBackend:
    """The fast backend for CPU tensors.

    Returns:
        The backend's module.

    Raises:
        BackendUnavailable: If numba is not installed.
    """
    return cast(HostBackend, get("cpu"))


def resolve(name: str | None, device: torch.device) -> Backend:
    """The named backend, or the fast one for a device.

    Args:
        name: `reference`, `cpu`, `triton`, or None: `triton` on cuda, `cpu` otherwise.
        device: The device of the tensors.

    Returns:
        The backend's module.

    Raises:
        BackendUnavailable: If it is not there.
    """
    return get(name or ("triton" if device.type == "cuda" else "cpu"))
