"""Block means along rows (FOAM, arXiv 2512.07112)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.fp32 import fp32_like, rounding, store
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec, inner_parts
from statecodec.codecs.raw import Raw
from statecodec.codecs.rows import FIRST, LAST, along_the_last, as_rows, in_rows, rows_cols
from statecodec.dtypes import FLOAT32, DType
from statecodec.kernels.fused import StateStorage
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Folded(Codec):
    """One fp32 mean per block of neighbours in a row: parts `mean.*`, as `inner` encodes the means.

    A row's short tail block is the mean of the entries that it has (the published code divides by the full block).
    Decoding repeats the mean: what varies within a block is lost, so the error is the distance to the block's mean plus
    that of the inner codec. NaN and infinities are refused: they would spread over their block.

    Args:
        level: A block has 2**level entries; 0 to 16.
        inner: The codec of the means.
        rows: `first`: a row is everything but the first dimension. `last`: a row is the last dimension, as in version
            1.

    Source:
        FOAM (arXiv 2512.07112).

    Example:
        >>> import torch
        >>> Folded(level=1).encode(torch.tensor([[1.0, 3.0, 5.0]])).decode()
        tensor([[2., 2., 5.]])
    """

    name: ClassVar[str] = "folded"
    version: ClassVar[int] = 2

    level: int = 3
    inner: Codec = field(default_factory=Raw)
    rows: str = FIRST

    def __post_init__(self) -> None:
        self.require(0 <= self.level <= 16, f"level={self.level}, expected 0 to 16")
        self.require(self.rows in (FIRST, LAST), f"rows={self.rows!r}, expected first or last")
        self.require_inner(self.inner)

    @property
    def block(self) -> int:
        """Entries of a block."""
        return 1 << self.level

    def mean_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the means of a tensor.

        Args:
            shape: The tensor's shape.

        Returns:
            The shape with each row's length divided by the block and rounded up.
        """
        return in_rows(shape, -(-self.rows_cols(shape)[1] // self.block), self.rows)

    def rows_cols(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return rows_cols(shape, self.rows)

    @classmethod
    def upgraded(cls, version: int, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return along_the_last(version, fields)

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        inner = self.inner.parts(self.mean_shape(shape), FLOAT32)
        return {f"mean.{k}": spec for k, spec in inner.items()}

    def align(self, shape: tuple[int, ...]) -> int | None:
        inner = self.inner.align(self.mean_shape(shape))
        return None if inner is None else inner * self.block

    def stored(self) -> StateStorage | None:
        inner = self.inner.stored()
        if inner is None or inner.block or inner.dims or self.rows != FIRST:
            return None
        return replace(inner, block=self.block)

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        mean = torch.empty(self.mean_shape(tuple(x.shape)), dtype=torch.float32, device=x.device)
        self.refuse(backend.fold_mean(as_rows(x, self.rows), self._matrix(mean), block=self.block))
        self.inner.encode_into(mean, inner_parts(parts, "mean"), backend)

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        shape = tuple(out.shape)
        mean = torch.empty(self.mean_shape(shape), dtype=torch.float32, device=out.device)
        self.inner.decode_into(inner_parts(parts, "mean"), mean, backend)
        values = fp32_like(out)
        backend.unfold(self._matrix(mean), self._matrix(values), block=self.block)
        store(values, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        shape = tuple(x.shape)
        values = as_rows(x.contiguous(), self.rows)
        mean = torch.empty(self.mean_shape(shape), dtype=torch.float32, device=x.device)
        reference = kernels.get("reference")
        reference.fold_mean(values, self._matrix(mean), block=self.block)
        repeat = torch.empty(values.shape, dtype=torch.float64, device=x.device)
        reference.unfold(self._matrix(mean).to(torch.float64), repeat, block=self.block)
        inner = torch.empty(values.shape, dtype=torch.float64, device=x.device)
        reference.unfold(self._matrix(self.inner.error_bound(mean)), inner, block=self.block)
        return rounding(((values.to(torch.float64) - repeat).abs() + inner).view(x.shape), x)

    def _matrix(self, x: Tensor) -> Tensor:
        return x.view(self.rows_cols(tuple(x.shape)))
