"""Master weights as a 16-bit float plus a correction: the high part is the model's own bf16 or fp16 parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.fp32 import fp32_like, rounding
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.codecs.rows import as_rows
from statecodec.dtypes import BFLOAT16, FLOAT16, INT8, INT16, DType
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_HIGH = {"bf16": BFLOAT16, "fp16": FLOAT16}
_LOW = {8: INT8, 16: INT16}


@dataclass(frozen=True)
class Split(Codec):
    """An fp32 value as a 16-bit float and what it lacks: parts `high` (bf16 or fp16) and `low` (int8 or int16).

    The split is integer arithmetic on the bits. `high=bf16`: 16 low bits keep every fp32 bit; 8 keep 24 bits of the
    value, with an error of at most 2**-16 relative, 1/512 of a bf16 unit in the last place. `high=fp16`: 16 low bits
    are exact for 2**-14 <= |x| < 65520 and within 2**-41 below; 8 are within 2**-19 relative, 2**-33 below; finite
    values from 65520 on are refused. Encoding a decoded tensor changes nothing. Infinities, subnormals and -0.0 stay;
    NaN stays NaN without its payload. fp64 is rounded to fp32 first.

    Args:
        high: `bf16` or `fp16`: the dtype of the model's own parameter.
        low_bits: 8 or 16.

    Source:
        FlashOptim (arXiv 2602.23349), section 3.1; in integers in place of its floating-point form.

    Example:
        >>> import torch
        >>> encoded = Split(low_bits=16).encode(torch.tensor([0.1]))
        >>> encoded.parts, encoded.decode()
        ({'high': tensor([0.1001], dtype=torch.bfloat16), 'low': tensor([-13107], dtype=torch.int16)}, tensor([0.1000]))
    """

    name: ClassVar[str] = "split"

    high: str = "bf16"
    low_bits: int = 8

    def __post_init__(self) -> None:
        self.require(self.high in _HIGH, f"high={self.high!r}, expected bf16 or fp16")
        self.require(self.low_bits in _LOW, f"low_bits={self.low_bits}, expected 8 or 16")

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        return {"high": PartSpec(_HIGH[self.high], shape), "low": PartSpec(_LOW[self.low_bits], shape)}

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        values = as_rows(x)
        if x.dtype == torch.float64:
            self.refuse(kernels.INF * bool((values.isinf() & x.view(values.shape).isfinite()).any()))
        self.refuse(backend.encode_split(values.view(-1), parts["high"].view(-1), parts["low"].view(-1)))

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        values = fp32_like(out)
        backend.decode_split(parts["high"].view(-1), parts["low"].view(-1), values.view(-1))
        if values is not out:
            out.copy_(values)  # not `store`: infinities stay

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        size = x.to(torch.float32).to(torch.float64).abs()
        if self.high == "bf16":
            # Next to fp32's maximum the 24-bit rounding saturates instead of reaching infinity: one unit, not half.
            bound = (
                size * 2.0**-16 * (1 + (size > 3.40e38)) + 2.0**-142 if self.low_bits == 8 else torch.zeros_like(size)
            )
        else:
            normal = size * 2.0**-19 if self.low_bits == 8 else torch.zeros_like(size)
            bound = torch.where(size >= 2.0**-14, normal, torch.full_like(size, 2.0 ** -(25 + self.low_bits)))
        bound = torch.where(size.isfinite(), bound, torch.zeros_like(size))
        if x.dtype == torch.float32 and self.high == "bf16" and self.low_bits == 16:
            return bound
        return rounding(bound, x) + (x.to(torch.float64).abs() * 2.0**-23 if x.dtype == torch.float64 else 0.0)
