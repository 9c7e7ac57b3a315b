"""What changed since another checkpoint: codecs that need a base to encode and to decode.

On their own they refuse: whoever opens a link of a chain brings the parts or values (statecodec.checkpoint.chain).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.base import NOTHING, Codec, Given, PartSpec, inner_parts, store
from statecodec.codecs.cast import Cast
from statecodec.codecs.companded import Companded
from statecodec.codecs.logarithmic import Logarithmic
from statecodec.codecs.raw import Raw
from statecodec.codecs.split import Split
from statecodec.codecs.uniform import Uniform
from statecodec.dtypes import FLOAT32, INT16, INT32, INT64, UINT8, DType
from statecodec.errors import FormatError
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS = {1: UINT8, 2: INT16, 4: INT32, 8: INT64}


class Based(Codec):
    """A codec whose tensors cannot be decoded without the same tensor of a base checkpoint."""

    stands_alone: ClassVar[bool] = False

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, given: Given = NOTHING
    ) -> None:
        raise FormatError(f"{self.name} stores what changed since a base checkpoint: it cannot encode without one")

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, given: Given = NOTHING
    ) -> None:
        raise FormatError(f"{self.name} stores what changed since a base checkpoint: it cannot be decoded without it")


@dataclass(frozen=True)
class Delta(Based):
    """The parts of `inner`, as integers, minus those of the base: nothing is lost. Parts `delta.*`.

    Each element's bits are subtracted as integers of its width and folded to small unsigned ones (0, -1, 1, -2 ...
    become 0, 1, 2, 3): what changed little has planes of zeros, which pack. Decodes to exactly what `inner` alone
    would.
    """

    name: ClassVar[str] = "delta"

    inner: Codec = field(default_factory=Raw)

    def __post_init__(self) -> None:
        known = isinstance(self.inner, Raw | Cast | Split | Companded | Logarithmic | Uniform)
        self.require(known, "inner is one of raw, cast, split, companded, logarithmic, uniform")

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        specs = self.inner.parts(shape, dtype)
        # Elements wider than eight bytes (complex) are taken apart into integers of eight.
        return {
            f"delta.{k}": PartSpec(_INTEGERS[min(s.dtype.itemsize, 8)], _integer_shape(s)) for k, s in specs.items()
        }

    def align(self, shape: tuple[int, ...]) -> int | None:
        return self.inner.align(shape)

    def error_bound(self, x: Tensor, given: Given = NOTHING) -> Tensor:
        return self.inner.error_bound(x)

    def difference(self, parts: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts to store, of `inner`'s parts and those of the base (same dtypes and shapes)."""
        found = {}
        for name, part in parts.items():
            own, other = _integers(part), _integers(base[name])
            found[f"delta.{name}"] = _fold(own - other)
        return found

    def apply(self, stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inner`'s parts again."""
        changes = inner_parts(stored, "delta")
        found = {}
        for name, part in base.items():
            whole = _integers(part) + _unfold(changes[name])
            found[name] = whole.view(part.dtype).view(part.shape)
        return found


@dataclass(frozen=True)
class Residual(Based):
    """What the values differ by from those of the base, encoded by `inner`: parts `residual.*`.

    Lossy as `inner` is on the residual, whose size is how far training has moved: the error does not add up along a
    chain, because the base of each link is what decoding the one before gives.
    """

    name: ClassVar[str] = "residual"

    inner: Codec = field(default_factory=Companded)

    def __post_init__(self) -> None:
        self.require(isinstance(self.inner, Cast | Companded | Uniform), "inner is one of cast, companded, uniform")
        self.require(not (isinstance(self.inner, Companded) and not self.inner.signed), "inner must be signed")

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        return {f"residual.{k}": spec for k, spec in self.inner.parts(shape, FLOAT32).items()}

    def align(self, shape: tuple[int, ...]) -> int | None:
        return self.inner.align(shape)

    def error_bound(self, x: Tensor, given: Given = NOTHING) -> Tensor:
        return torch.full(x.shape, torch.inf, dtype=torch.float64, device=x.device)  # depends on the base

    def encode_from(self, x: Tensor, base: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of `x` against the base's values, and what they decode to. Raises UnencodableValues."""
        encoded = self.inner.encode(x.to(torch.float32) - base.to(torch.float32).view(x.shape))
        parts = {f"residual.{k}": part for k, part in encoded.parts.items()}
        return parts, self.decode_from(parts, base.view(x.shape), x.dtype)

    def decode_from(self, parts: Mapping[str, Tensor], base: Tensor, dtype: torch.dtype) -> Tensor:
        """The values again, in the base's shape: one fp32 addition per element."""
        change = torch.empty(base.shape, dtype=torch.float32, device=base.device)
        self.inner.decode_into(inner_parts(parts, "residual"), change, kernels.resolve(None, base.device))
        out = torch.empty(base.shape, dtype=dtype, device=base.device)
        store(change.add_(base.to(torch.float32)), out)
        return out


def is_exact(codec: Codec) -> bool:
    """Whether a tensor comes back bit for bit: so says the codec, or it is the change of one that says so."""
    return codec.exact or (isinstance(codec, Delta) and codec.inner.exact)


def standalone(codec: Codec) -> Codec:
    """The codec whose parts a tensor has once its base has been brought."""
    return codec.inner if isinstance(codec, Delta) else codec


def _integer_shape(spec: PartSpec) -> tuple[int, ...]:
    return spec.shape if spec.dtype.itemsize <= 8 else (*spec.shape, spec.dtype.itemsize // 8)


def _integers(part: Tensor) -> Tensor:
    integer = _INTEGERS[min(part.dtype.itemsize, 8)].torch
    if part.dtype.itemsize > 8:
        return torch.view_as_real(part.contiguous()).view(integer)
    return part.contiguous().view(integer)


def _fold(x: Tensor) -> Tensor:
    """Two's complement to zigzag, in the same width; bytes go by way of int8."""
    signed = x.view(torch.int8) if x.dtype == torch.uint8 else x
    width = 8 * signed.dtype.itemsize
    return ((signed << 1) ^ (signed >> (width - 1))).view(x.dtype)


def _unfold(x: Tensor) -> Tensor:
    signed = x.view(torch.int8) if x.dtype == torch.uint8 else x
    width = 8 * signed.dtype.itemsize
    positive = (signed >> 1) & ((1 << (width - 1)) - 1)  # a logical shift
    return (positive ^ -(signed & 1)).view(x.dtype)
