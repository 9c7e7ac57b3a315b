"""A tensor that equals another one of the same file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import dtypes, kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.dtypes import DType
from statecodec.errors import FormatError, UnencodableValues
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Same(Codec):
    """No parts: the tensor is what its companion `original`, of the same dtype, decodes to.

    Takes every dtype. Refuses a tensor that differs from its original in a single bit, as both were before encoding.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0])
        >>> Same().encode(x, companions={"original": x}).decode(companions={"original": x})
        tensor([1., 2.])
    """

    name: ClassVar[str] = "same"
    needs: ClassVar[tuple[str, ...]] = ("original",)
    repeats: ClassVar[bool] = True

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        return {}

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        if not torch.equal(_bytes(x), _bytes(self._original(x, companions))):
            raise UnencodableValues("it is no copy of the tensor that it seemed to repeat")

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        out.copy_(self._original(out, companions).view(out.shape))

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64, device=x.device)

    def _original(self, like: Tensor, companions: Companions) -> Tensor:
        """The companion's numbers as they are, not as fp32."""
        values = companions.get("original")
        if values is None or values.numel() != like.numel() or values.dtype != like.dtype:
            there = "nothing" if values is None else f"{values.numel()} elements of {dtypes.of(values.dtype)}"
            raise FormatError(
                f"same needs {like.numel()} elements of {dtypes.of(like.dtype)} as original, found {there}"
            )
        return values


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
