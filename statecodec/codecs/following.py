"""A tensor that stays near another one, such as a running average of weights: stored as the difference of the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.fp32 import fp32_like, rounding, store
from statecodec.codecs.on_grid import OnGrid, grid_bound
from statecodec.codecs.parts import NO_COMPANIONS, Companions
from statecodec.codecs.rows import as_rows
from statecodec.errors import UnencodableValues
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Following(OnGrid):
    """How many times `step` each value is away from its companion's, rounded to nearest: part `codes` (int32).

    The companion `weight` is what the reader decodes, so the error is that of rounding alone, rms step / sqrt(12),
    whatever the weight is stored as. Running averages are nearer to their weights than to 0: the codes are smaller than
    those of `uniform` with the same step.

    Where both are equal the code is 0, and a 0 decodes to the weight. From 2**22 cells on the distance is exact, as in
    `uniform`. NaN and infinities are refused, in the tensor and in the weight.

    Args:
        step: The width of the grid, in units of the values, from 2**-126 to 2**100.

    Example:
        >>> import torch
        >>> weight = torch.tensor([7.0, -1.0])
        >>> Following(step=0.5).encode(weight + 1.1, companions={"weight": weight}).parts["codes"]
        tensor([2, 2], dtype=torch.int32)
    """

    name: ClassVar[str] = "following"
    needs: ClassVar[tuple[str, ...]] = ("weight",)
    needs_decoded: ClassVar[bool] = True

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        values, weight = as_rows(x).view(-1), self.companion(companions, x)
        flags, _ = backend.encode_uniform(values - weight, parts["codes"].view(-1), grid=self.grid)
        if flags and values.isfinite().all():
            raise UnencodableValues(f"{self.name}: its weight holds NaN or infinities, or is too far away")
        self.refuse(flags)

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        weight, values = self.companion(companions, out), fp32_like(out)
        backend.decode_uniform(parts["codes"].view(-1), values.view(-1), grid=self.grid)
        largest = torch.finfo(torch.float32).max
        values.view(-1).add_(weight).clamp_(-largest, largest)
        store(values, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        value = x.to(torch.float64)
        distance = value - self.companion(companions, x).to(torch.float64).view(x.shape)
        # Beside the grid's error the rounding of the difference and of the sum.
        bound = grid_bound(distance, self.grid) + (distance.abs() + value.abs()) * 2.0**-22
        return rounding(bound, x)
