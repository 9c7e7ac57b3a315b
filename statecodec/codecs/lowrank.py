"""Low-rank factors of a matrix (LoRA-Pre, arXiv 2602.24283; the rank-one non-negative form is Adafactor's)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.chunking import PIECE_ELEMENTS, iterate
from statecodec.codecs.fp32 import rounding, store
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.codecs.raw import Raw
from statecodec.codecs.rows import FIRST, LAST, along_the_last, rows_cols
from statecodec.dtypes import FLOAT32, DType, of
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_FORMS = ("product", "square", "rank_one")
_LARGEST = 1e38  # beyond, products of fp32 factors may round to infinity
_EXACT_SVD = 1024  # up to this smaller side; beyond, seeded subspace iteration


@dataclass(frozen=True)
class LowRank(Codec):
    """Two fp32 factors of a matrix (rows x cols): parts `left` (rows x rank) and `right` (rank x cols).

    A rank above the smaller side is lowered to it. NaN and values beyond 1e38 are refused; `square` and `rank_one` also
    refuse negative values. The error of `product` is the first singular value that is left out. Needs the whole tensor
    at once.

    Args:
        rank: 1 to 65536.
        form: `product`: x = left @ right, the best approximation of that rank. `square`, for second moments: x = (left
            @ right)**2 elementwise, so these are factors of sqrt(x). `rank_one`, for second moments and rank 1: x = row
            mean * column mean / mean; never negative, and 0 where x is not only if the product underflows.
        rows: `first`: a row is everything but the first dimension. `last`: a row is the last dimension, as in version
            1.

    Source:
        LoRA-Pre (arXiv 2602.24283) for `product` and `square`; Adafactor (arXiv 1804.04235) for `rank_one`.

    Example:
        >>> import torch
        >>> encoded = LowRank(rank=1, form="rank_one").encode(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        >>> encoded.parts["left"].shape, encoded.decode().round(decimals=4)
        (torch.Size([2, 1]), tensor([[1., 2.],
                [2., 4.]]))
    """

    name: ClassVar[str] = "lowrank"
    version: ClassVar[int] = 2

    rank: int = 8
    form: str = "product"
    rows: str = FIRST

    def __post_init__(self) -> None:
        self.require(1 <= self.rank <= 65536, f"rank={self.rank}, expected 1 to 65536")
        self.require(self.form in _FORMS, f"form={self.form!r}, expected one of {', '.join(_FORMS)}")
        self.require(self.rows in (FIRST, LAST), f"rows={self.rows!r}, expected first or last")
        self.require(self.form != "rank_one" or self.rank == 1, "form=rank_one needs rank=1")

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        rows, cols = self.rows_cols(shape)
        rank = min(self.rank, rows, cols)
        return {"left": PartSpec(FLOAT32, (rows, rank)), "right": PartSpec(FLOAT32, (rank, cols))}

    def rows_cols(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return rows_cols(shape, self.rows)

    @classmethod
    def upgraded(cls, version: int, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return along_the_last(version, fields)

    def align(self, shape: tuple[int, ...]) -> int | None:
        return None

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        matrix = x.view(self.rows_cols(tuple(x.shape))).to(torch.float64)
        self.refuse(
            kernels.NAN * bool(matrix.isnan().any())
            | kernels.INF * bool((matrix.abs() > _LARGEST).any())
            | kernels.NEGATIVE * bool(self.form != "product" and (matrix < 0).any())
        )
        if not matrix.numel():
            return
        left, right = self._factors(matrix)
        parts["left"].copy_(left)
        parts["right"].copy_(right)

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        shape = tuple(out.shape)
        matrix = out.view(self.rows_cols(shape))
        for piece in iterate(Raw(), tuple(matrix.shape), of(out.dtype), PIECE_ELEMENTS):
            rows, cols = piece.shape if len(piece.shape) == 2 else matrix.shape
            first, column = divmod(piece.start, max(matrix.shape[1], 1))
            target = matrix[first : first + rows, column : column + cols]
            self._multiply(parts, first, column, target)

    @property
    def portable(self) -> bool:
        return False

    @property
    def in_pieces(self) -> bool:
        return True

    def decode_piece(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], start: int, out: Tensor, backend: kernels.Backend
    ) -> None:
        self._multiply(parts, *divmod(start, self.rows_cols(shape)[1]), out)

    def _multiply(self, parts: Mapping[str, Tensor], row: int, column: int, out: Tensor) -> None:
        rows, cols = out.shape
        product = parts["left"][row : row + rows] @ parts["right"][:, column : column + cols]
        if self.form == "square":
            product.square_()
        store(product, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        matrix = x.to(torch.float64).reshape(self.rows_cols(tuple(x.shape)))
        if not matrix.numel():
            return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        if self.form == "rank_one":
            left, right = self._factors(matrix)
            return rounding((matrix - left @ right).abs().view(x.shape), x) + 2.0**-149
        values = torch.linalg.svdvals(matrix.sqrt() if self.form == "square" else matrix)
        left_out = float(values[self.rank]) if self.rank < len(values) else 0.0
        # Beyond _EXACT_SVD subspace iteration finds a rank-r space within a few per cent of the best.
        slack = 1.0 if min(matrix.shape) <= _EXACT_SVD else 1.2
        bound = torch.full_like(matrix, left_out * slack + float(values[0]) * 1e-5 + 1e-44)
        if self.form == "square":
            bound = bound * (2 * matrix.sqrt() + bound)
        return rounding(bound.view(x.shape), x)

    def _factors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "rank_one":
            # Row and column means are each scaled by the root of the overall mean: products stay in fp32's range.
            root = matrix.mean().sqrt().clamp(min=1e-300)
            return matrix.mean(1, keepdim=True) / root, matrix.mean(0, keepdim=True) / root
        target = matrix.sqrt() if self.form == "square" else matrix
        rank = min(self.rank, *target.shape)
        if min(target.shape) <= _EXACT_SVD:
            u, s, vh = torch.linalg.svd(target, full_matrices=False)
        else:
            u, s, vh = _subspace_svd(target, rank)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * vh[:rank]


def _subspace_svd(matrix: Tensor, rank: int, iterations: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration with oversampling; the seed is fixed, so bits repeat."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = min(rank + max(8, rank // 4), *matrix.shape)
    start = torch.randn(matrix.shape[1], width, dtype=matrix.dtype, device="cpu", generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh
