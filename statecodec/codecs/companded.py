"""Companded quantisation: 8 or 4 bits per value and one bf16 scale per group (FlashOptim section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec, renamed
from statecodec.codecs.fp32 import fp32_like, rounding, store
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.codecs.rows import FIRST, LAST, along_the_last, as_rows, in_rows, rows_cols
from statecodec.dtypes import BFLOAT16, INT8, UINT8, DType
from statecodec.kernels.curves import DEFAULT_PER_OCTAVE, KINDS, LINEAR, LOG, SOFTSIGN, Curve
from statecodec.kernels.fused import StateStorage
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MAX_OCTAVES = 100  # keeps every level a normal fp32 number


@dataclass(frozen=True)
class Companded(Codec):
    """Codes of 8 or 4 bits and one bf16 scale per group: parts `codes` and `scales`.

    Groups run along a row and restart at each row. The scale is the group's largest magnitude, rounded to bf16 before
    encoding, so it has fp32's range and is what decoding uses. `codes` is int8 for signed curves, uint8 for others;
    codes of 4 bits lie two a byte along the row, low nibble first.

    Zeros decode to exact zeros, and for unsigned curves nothing else does: a positive value gets at least code 1,
    because a second moment that decodes to 0 would divide its update by eps. -0.0 becomes 0.0. NaN, infinities and, for
    unsigned curves, negative values are refused. The error is half a code in the curve's own domain.

    Args:
        curve: `softsign` or `linear`, signed, for first moments; `sqrt` or `log`, unsigned, for second moments.
        bits: 8 or 4.
        group: Values per scale, an even number from 2 to 65536.
        per_octave: Codes per octave of `log`; 0 means 16 for 8 bits, 2 for 4 bits. Versions 1 and 2 called it `steps`.
        top: The largest code; 0 for as many as the bits allow. Fewer codes take the same bytes unpacked and fewer
            packed: 8-bit codes with top=15 pack into about 4.5 bits.
        rows: `first`: a row is everything but the first dimension. `last`: a row is the last dimension, as in version
            1.

    Source:
        FlashOptim (arXiv 2602.23349), section 3.2. docs/codecs.md lists the deviations.

    Example:
        >>> import torch
        >>> encoded = Companded(curve="log", bits=8, group=2).encode(torch.tensor([[1.0, 0.5, 1e-30, 0.0]]))
        >>> encoded.parts["codes"].tolist(), encoded.parts["scales"].shape
        ([[255, 239, 255, 0]], torch.Size([1, 2]))
    """

    name: ClassVar[str] = "companded"
    version: ClassVar[int] = 3

    curve: str = "softsign"
    bits: int = 8
    group: int = 128
    per_octave: int = 0
    top: int = 0
    rows: str = FIRST

    def __post_init__(self) -> None:
        self.require(self.curve in KINDS, f"curve={self.curve!r}, expected one of {', '.join(KINDS)}")
        self.require(self.bits in (8, 4), f"bits={self.bits}, expected 8 or 4")
        self.require(2 <= self.group <= 65536 and self.group % 2 == 0, f"group={self.group}, expected even, 2 to 65536")
        self.require(self.per_octave == 0 or self.curve == "log", "per_octave is for curve=log only")
        self.require(self.rows in (FIRST, LAST), f"rows={self.rows!r}, expected first or last")
        most = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        self.require(0 <= self.top <= most, f"top={self.top}, expected 0 to {most}")
        octaves = ((self.top or most) + 1) / (self.per_octave or DEFAULT_PER_OCTAVE[self.bits])
        self.require(
            self.per_octave >= 0 and octaves <= _MAX_OCTAVES,
            f"per_octave={self.per_octave}: the codes span over {_MAX_OCTAVES} octaves",
        )
        self.require(self.per_octave <= 64, f"per_octave={self.per_octave}, expected at most 64")

    @property
    def signed(self) -> bool:
        """Whether the curve has negative codes."""
        return self.curve in ("softsign", "linear")

    @cached_property
    def levels(self) -> Curve:
        """The curve with its decode table."""
        return Curve(self.curve, self.bits, self.signed, self.per_octave or DEFAULT_PER_OCTAVE[self.bits], self.top)

    def config(self) -> dict[str, Any]:
        """As for every codec; `top` only where it is set, so that files without it stay what they were."""
        config = super().config()
        return config if self.top else {k: v for k, v in config.items() if k != "top"}

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        _, cols = self.rows_cols(shape)
        packed = shape if self.bits == 8 else in_rows(shape, -(-cols // 2), self.rows)
        return {
            "codes": PartSpec(INT8 if self.signed and self.bits == 8 else UINT8, packed),
            "scales": PartSpec(BFLOAT16, in_rows(shape, -(-cols // self.group), self.rows)),
        }

    def rows_cols(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return rows_cols(shape, self.rows)

    @classmethod
    def upgraded(cls, version: int, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if version not in (1, 2) or "per_octave" in fields:
            return None
        fields = renamed(fields, "steps", "per_octave")
        return fields if version == 2 else along_the_last(version, fields)

    def align(self, shape: tuple[int, ...]) -> int | None:
        return lcm(self.group, 2)

    def stored(self) -> StateStorage | None:
        return StateStorage(self.levels, self.group) if self.rows == FIRST else None

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        flags = backend.encode_companded(
            as_rows(x, self.rows), parts["codes"], parts["scales"], curve=self.levels, group=self.group
        )
        self.refuse(flags)

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        values = fp32_like(out)
        rows = values.view(self.rows_cols(tuple(out.shape)))
        backend.decode_companded(parts["codes"], parts["scales"], rows, curve=self.levels, group=self.group)
        store(values, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        if not x.numel():
            return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        values = as_rows(x.contiguous(), self.rows).to(torch.float64)
        rows, cols = values.shape
        groups = -(-cols // self.group)
        padded = torch.nn.functional.pad(values.abs(), (0, groups * self.group - cols)).view(rows, groups, self.group)
        scale = padded.amax(-1, keepdim=True).to(torch.bfloat16).to(torch.float64)
        scale = scale.clamp(max=torch.finfo(torch.bfloat16).max, min=2.0**-126)
        r = padded / scale
        half = 0.51 / self.levels.top  # half a code, and a little for the fp32 arithmetic of the encoder
        y = self._curve(r.clamp(max=1.0))
        near = torch.maximum(self._inverse(y + half) - self._inverse(y), self._inverse(y) - self._inverse(y - half))
        lowest = 0.0 if self.signed and self.curve != "log" else float(self.levels.levels[1])
        bound = torch.maximum(near + (r - 1.0).clamp(min=0), torch.full_like(r, lowest)) * scale
        bound = torch.where(padded == 0, torch.zeros_like(bound), bound)
        return rounding(bound.view(rows, -1)[:, :cols].reshape(x.shape), x)

    def _curve(self, r: Tensor) -> Tensor:
        if self.levels.kind == LINEAR:
            return r
        if self.levels.kind == SOFTSIGN:
            return 2 * r / (1 + r)
        if self.levels.kind == LOG:
            return (1 + r.clamp(min=1e-300).log2() * self.levels.per_octave / self.levels.top).clamp(min=0)
        return r.sqrt()

    def _inverse(self, y: Tensor) -> Tensor:
        if self.levels.kind == LINEAR:
            return y
        if self.levels.kind == SOFTSIGN:
            return y / (2 - y)
        if self.levels.kind == LOG:
            return torch.exp2((y - 1) * self.levels.top / self.levels.per_octave)
        return y.clamp(min=0).square()
