"""Centring a matrix of codes: subtracting each column's and each row's mean, modulo the code width.

Second moments are close to a row factor times a column factor (Adafactor's observation), so their log codes and
exponents are close to a row term plus a column term. Subtracting both loses nothing and takes a bit or more off the
entropy of what remains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def centre(plane: Tensor, columns: Tensor, lines: Tensor, residual: Tensor, *, nibbles: bool) -> None:
    """Write the means and the residual of a plane of bytes.

    Args:
        plane: uint8, rows x cols.
        columns: Written: uint8, cols: the rounded column means.
        lines: Written: uint8, rows: the rounded row means.
        residual: Written: uint8, rows x cols: plane - columns - lines, modulo 256.
        nibbles: Every byte is two 4-bit codes, treated apart and modulo 16; a line's mean is one nibble for both.

    Source:
        Adafactor (arXiv 1804.04235), which finds second moments close to a row factor times a column factor.
    """
    codes = _codes(plane, nibbles)
    rows, cols = codes.shape
    column = _rounded(codes.sum(0), rows)
    line = _rounded(codes.sum(1) - column.sum(), cols)
    rest = codes - column - line[:, None]
    columns.copy_(_bytes(column[None, :], nibbles)[0])
    lines.copy_((line & (15 if nibbles else 255)).to(torch.uint8))
    residual.copy_(_bytes(rest, nibbles))


def uncentre(residual: Tensor, columns: Tensor, lines: Tensor, plane: Tensor, *, nibbles: bool) -> None:
    """The inverse of `centre`, for any contents.

    Args:
        residual: As written.
        columns: As written.
        lines: As written.
        plane: Written: uint8, rows x cols.
        nibbles: As for `centre`.
    """
    codes = _codes(residual, nibbles) + _codes(columns[None, :], nibbles) + lines.to(torch.int64)[:, None]
    plane.copy_(_bytes(codes, nibbles))


def byte_counts(plane: Tensor) -> Tensor:
    """How often each byte occurs.

    Args:
        plane: uint8, of any shape.

    Returns:
        int64, 256.
    """
    return torch.bincount(plane.reshape(-1), minlength=256)


def _codes(plane: Tensor, nibbles: bool) -> Tensor:
    wide = plane.to(torch.int64)
    return torch.stack((wide & 15, wide >> 4), -1).flatten(1) if nibbles else wide


def _bytes(codes: Tensor, nibbles: bool) -> Tensor:
    if nibbles:
        codes = (codes[:, 0::2] & 15) | ((codes[:, 1::2] & 15) << 4)
    return (codes & 255).to(torch.uint8)


def _rounded(total: Tensor, count: int) -> Tensor:
    """total / count, rounded half up."""
    return torch.div(2 * total + count, 2 * count, rounding_mode="floor")
