"""One value shared along whole dimensions (SlimAdam, arXiv 2503.01843, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.fp32 import rounding, store
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec, inner_parts
from statecodec.codecs.raw import Raw
from statecodec.dtypes import FLOAT32, DType
from statecodec.errors import UnsupportedTensor
from statecodec.kernels.fused import StateStorage
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shared(Codec):
    """The fp32 mean over whole dimensions: parts `mean.*`, as `inner` encodes the mean.

    Decoding broadcasts the mean, so the error is the distance to it plus that of the inner codec. NaN and infinities
    are refused: they would spread. Needs the whole tensor at once.

    Args:
        dims: The dimensions that share one value, from 0, in rising order. A matrix (fan_out, fan_in) shared over 1
            keeps one value per row.
        inner: The codec of the mean.

    Source:
        SlimAdam (arXiv 2503.01843), section 3.

    Example:
        >>> import torch
        >>> Shared(dims=(1,)).encode(torch.tensor([[1.0, 3.0], [4.0, 4.0]])).decode()
        tensor([[2., 2.],
                [4., 4.]])
    """

    name: ClassVar[str] = "shared"

    dims: tuple[int, ...] = (1,)
    inner: Codec = field(default_factory=Raw)

    def __post_init__(self) -> None:
        legal = self.dims and all(0 <= d < 16 for d in self.dims) and list(self.dims) == sorted(set(self.dims))
        self.require_inner(self.inner)
        self.require(bool(legal), f"dims={list(self.dims)}, expected distinct dimensions in rising order, from 0")

    def mean_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the mean of a tensor.

        Args:
            shape: The tensor's shape.

        Returns:
            The shape with the shared dimensions of size 1.

        Raises:
            UnsupportedTensor: If the tensor does not have all of `dims`.
        """
        if self.dims[-1] >= len(shape):
            raise UnsupportedTensor(
                f"shared over dimensions {list(self.dims)} needs more dimensions than shape {list(shape)}"
            )
        return tuple(min(n, 1) if d in self.dims else n for d, n in enumerate(shape))

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        return {f"mean.{k}": spec for k, spec in self.inner.parts(self.mean_shape(shape), FLOAT32).items()}

    def align(self, shape: tuple[int, ...]) -> int | None:
        return None

    def stored(self) -> StateStorage | None:
        inner = self.inner.stored()
        if inner is None or inner.block or inner.dims:
            return None
        return replace(inner, dims=self.dims)

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        mean = self._mean(x)
        self.refuse(kernels.NAN * bool(mean.isnan().any()) | kernels.INF * bool(mean.isinf().any()))
        self.inner.encode_into(mean, inner_parts(parts, "mean"), backend)

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        mean = torch.empty(self.mean_shape(tuple(out.shape)), dtype=torch.float32, device=out.device)
        self.inner.decode_into(inner_parts(parts, "mean"), mean, backend)
        store(mean, mean_out := torch.empty_like(mean, dtype=out.dtype))
        out.copy_(mean_out.expand(out.shape))

    @property
    def portable(self) -> bool:
        return False

    @property
    def in_pieces(self) -> bool:
        return self.inner.align((2, 2)) is not None  # the mean itself is decoded whole

    def decode_piece(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], start: int, out: Tensor, backend: kernels.Backend
    ) -> None:
        small = self.mean_shape(shape)
        mean = torch.empty(small, dtype=torch.float32, device=out.device)
        self.inner.decode_into(inner_parts(parts, "mean"), mean, backend)
        store(mean, rounded := torch.empty_like(mean, dtype=out.dtype))
        rows, cols = out.shape
        if cols == self.rows_cols(shape)[1] and len(shape) > 1:
            first = start // cols
            block = rounded if 0 in self.dims else rounded[first : first + rows]
            out.view(rows, *shape[1:]).copy_(block.expand(rows, *shape[1:]))
            return
        at = torch.arange(start, start + out.numel(), device=out.device)
        index = torch.zeros_like(at)
        for dim in reversed(range(len(shape))):
            if dim not in self.dims:
                index += at % shape[dim] * math.prod(small[dim + 1 :])
            at = at // shape[dim]
        out.view(-1).copy_(rounded.view(-1)[index])

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        mean = self._mean(x)
        return rounding((x.to(torch.float64) - mean.to(torch.float64)).abs() + self.inner.error_bound(mean), x)

    def _mean(self, x: Tensor) -> Tensor:
        if not x.numel():
            return torch.zeros(self.mean_shape(tuple(x.shape)), dtype=torch.float32, device=x.device)
        return x.mean(self.dims, keepdim=True, dtype=torch.float64).to(torch.float32).contiguous()
