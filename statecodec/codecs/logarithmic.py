"""Log codes on one grid for all of fp32: a constant relative error for second moments, whatever they span."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec, renamed
from statecodec.codecs.fp32 import fp32_like, rounding, store
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.dtypes import INT16, DType
from statecodec.elementwise import as_fp32
from statecodec.kernels.grids import MAX_PER_OCTAVE, LogGrid
from statecodec.kernels.reference.statistics import Comparison
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Logarithmic(Codec):
    """The logarithm on one grid for all of fp32: part `codes` (int16).

    Codes start at fp32's smallest number; there are no groups and no scales. Code 0 means exactly 0, and nothing
    positive gets it. So rows of any range and dead units need no special case. The root, by which Adam divides, has an
    rms relative error of 0.1 / per_octave. Packing takes the means of rows and columns out of the codes. -0.0 becomes
    0.0. NaN, infinities and negative values are refused.

    Args:
        per_octave: Codes per octave, 1 to 64. Version 1 called it `steps`.

    Example:
        >>> import torch
        >>> Logarithmic(per_octave=8).encode(torch.tensor([0.0, 2.0**-149, 1.0])).parts["codes"]
        tensor([   0,    1, 1193], dtype=torch.int16)
    """

    name: ClassVar[str] = "logarithmic"
    version: ClassVar[int] = 2

    per_octave: int = 8

    def __post_init__(self) -> None:
        self.require(
            1 <= self.per_octave <= MAX_PER_OCTAVE, f"per_octave={self.per_octave}, expected 1 to {MAX_PER_OCTAVE}"
        )

    @cached_property
    def grid(self) -> LogGrid:
        """The grid with its table of values."""
        return LogGrid(self.per_octave)

    @classmethod
    def upgraded(cls, version: int, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        known = version == 1 and "per_octave" not in fields
        return renamed(fields, "steps", "per_octave") if known else None

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        return {"codes": PartSpec(INT16, shape)}

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> Comparison | None:
        values = as_fp32(x).view(-1)
        if x.dtype == torch.float64:  # below fp32's range: its smallest number, not 0
            values = torch.where((x.view(-1) > 0) & (values == 0), 2.0**-149, values)
        flags, sums = backend.encode_logarithmic(values, parts["codes"].view(-1), grid=self.grid)
        self.refuse(flags)
        return sums if x.dtype == torch.float32 else None

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        values = fp32_like(out)
        backend.decode_logarithmic(parts["codes"].view(-1), values.view(-1), grid=self.grid)
        store(values, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        size = x.to(torch.float64).abs()
        # Half a code, and the polynomial's own error of 1.2e-4 octaves.
        relative = 2.0 ** (0.5 / self.per_octave + 1.3e-4) - 1.0
        return rounding(torch.where(size > 0, size * relative + 2.0**-149, torch.zeros_like(size)), x)
