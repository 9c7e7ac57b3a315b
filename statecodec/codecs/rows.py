"""Tensors as rows. Groups and blocks of an encoding never cross a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from statecodec.elementwise import as_fp32

if TYPE_CHECKING:
    from torch import Tensor

FIRST, LAST = "first", "last"


def rows_cols(shape: tuple[int, ...], rows: str = FIRST) -> tuple[int, int]:
    """See a shape as a matrix of rows.

    Args:
        shape: The tensor's shape.
        rows: `first`: `(n, ...)` is n x the rest. `last`: `(..., q)` is the rest x q, as files of format 1.0 have it.

    Returns:
        (rows, columns); `()` is (1, 1) and `(n,)` is (1, n).

    Example:
        >>> rows_cols((64, 32, 3, 3)), rows_cols((64, 32, 3, 3), "last")
        ((64, 288), (6144, 3))
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    if rows == LAST:
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def along_the_last(version: int, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of version 1 of a codec, whose rows ran along the last dimension only."""
    return {**fields, "rows": LAST} if version == 1 and "rows" not in fields else None


def in_rows(shape: tuple[int, ...], cols: int, rows: str = FIRST) -> tuple[int, ...]:
    """The shape of `cols` numbers for every row of a tensor of this shape."""
    if len(shape) < 2:
        return (cols,)
    return (*(shape[:-1] if rows == LAST else shape[:1]), cols)


def as_rows(x: Tensor, rows: str = FIRST) -> Tensor:
    """`x` (contiguous) as an fp32 matrix of rows: a view if it is fp32 already."""
    return as_fp32(x).view(rows_cols(tuple(x.shape), rows))
