"""The identity: any dtype, any values, every bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.dtypes import DType
from statecodec.kernels.fused import StateStorage
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Raw(Codec):
    """The tensor itself, of any dtype: part `data`.

    NaN payloads, -0.0 and subnormals survive. Packing may still make it smaller.

    Example:
        >>> import torch
        >>> Raw().encode(torch.tensor([1, 2])).parts["data"]
        tensor([1, 2])
    """

    name: ClassVar[str] = "raw"
    exact: ClassVar[bool] = True

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        return {"data": PartSpec(dtype, shape)}

    def stored(self) -> StateStorage | None:
        return StateStorage()

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        parts["data"].copy_(x.view(parts["data"].shape))

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        out.copy_(parts["data"].view(out.shape))

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
