"""A narrower float: bf16 or fp16 (or fp32, for fp64 tensors)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_TARGETS = {"bf16": BFLOAT16, "fp16": FLOAT16, "fp32": FLOAT32}
_UNITS = {"bf16": (2.0**-8, 2.0**-134), "fp16": (2.0**-11, 2.0**-25), "fp32": (2.0**-24, 2.0**-150)}


@dataclass(frozen=True)
class Cast(Codec):
    """Round to nearest even into a narrower float: part `data`.

    NaN stays NaN; infinities and -0.0 stay. A finite value that would become infinite is refused (65504 of fp16 does in
    bf16, which rounds it up to 65536). The error is half a unit in the last place of the target.

    Args:
        to: `bf16`, `fp16` or `fp32`.

    Example:
        >>> import torch
        >>> Cast("bf16").encode(torch.tensor([1.001])).decode()
        tensor([1.])
    """

    name: ClassVar[str] = "cast"

    to: str = "bf16"

    def __post_init__(self) -> None:
        self.require(self.to in _TARGETS, f"to={self.to!r}, expected one of {', '.join(_TARGETS)}")

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        return {"data": PartSpec(_TARGETS[self.to], shape)}

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        data = parts["data"]
        data.copy_(x.view(data.shape))
        largest = min(torch.finfo(data.dtype).max, torch.finfo(x.dtype).max)
        if data.numel() and not kernels.trusted() and not float(data.abs().amax()) <= largest:  # true for NaN
            overflowed = data.to(x.dtype).isinf() & x.view(data.shape).isfinite()
            self.refuse(kernels.INF * bool(overflowed.any()))

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        out.copy_(parts["data"].view(out.shape))

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        relative, absolute = _UNITS[self.to]
        size = x.to(torch.float64).abs()
        exact = x.to(_TARGETS[self.to].torch).to(torch.float64) == x.to(torch.float64)
        return torch.where(exact, torch.zeros_like(size), size * relative + absolute)
