"""A copy of a tensor in a narrower float, such as the bf16 weights of an fp32 master."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.dtypes import BFLOAT16, FLOAT16, INT16, DType
from statecodec.errors import UnencodableValues, UnsupportedTensor
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ulps(Codec):
    """The distance of 16-bit weights from their rounded master, in numbers of their dtype: part `ulps` (int16).

    Exact: the element is that many numbers above the rounded companion, modulo 2**16, in the order -inf ... -0.0, 0.0
    ... inf. The companion is what the reader decodes, so weights come back bit for bit from a master that was stored
    lossily. Where the master's error crossed a rounding boundary the entry is not 0; all others pack to nothing.

    Takes bf16 and fp16. NaN is refused, in the tensor and in the companion.

    Example:
        >>> import torch
        >>> master = torch.tensor([0.1, 0.3])
        >>> Ulps().encode(master.bfloat16(), companions={"master": master}).parts["ulps"]
        tensor([0, 0], dtype=torch.int16)
    """

    name: ClassVar[str] = "ulps"
    needs: ClassVar[tuple[str, ...]] = ("master",)
    needs_decoded: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        if dtype not in (BFLOAT16, FLOAT16):
            raise UnsupportedTensor(f"{self.name} takes bf16 and fp16 tensors, not {dtype}")
        return {"ulps": PartSpec(INT16, shape)}

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        rounded = self.companion(companions, x).to(x.dtype)
        self.refuse(kernels.NAN * bool(x.isnan().any()))
        if rounded.isnan().any():  # which NaN it rounds to depends on the machine
            raise UnencodableValues(f"{self.name} cannot follow a master that holds NaN; raw keeps it as it is")
        torch.sub(_rank(x.view(-1)), _rank(rounded), out=parts["ulps"].view(-1))

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        rounded = self.companion(companions, out).to(out.dtype)
        if parts["ulps"].any():
            rounded = _rank((_rank(rounded) + parts["ulps"].view(-1)).view(out.dtype)).view(out.dtype)
        out.copy_(rounded.view(out.shape))

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64, device=x.device)


def _rank(x: Tensor) -> Tensor:
    """16-bit floats as int16 in the order of their values, -0.0 is -1; and such numbers as the bits of floats."""
    bits = x.view(torch.int16)
    return bits ^ ((bits >> 15) & 0x7FFF)
