"""Nothing is stored; the tensor decodes to zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.dtypes import DType
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dropped(Codec):
    """No parts: the tensor is not stored, and decodes to zeros.

    For moments that inference does not need. Training cannot resume from zeros as if nothing had happened.
    """

    name: ClassVar[str] = "dropped"

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        return {}

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        return

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        out.zero_()

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        return x.to(torch.float64).abs()
