"""Sums that errors are reported from, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Comparison(NamedTuple):
    """Of two tensors a (original) and b: sums over the elements where both are finite, and how many are not alike."""

    sum_sq: float
    """Sum of a**2."""
    sum_sq_diff: float
    """Sum of (b - a)**2."""
    max_abs_diff: float
    mismatched: int
    """Elements that are NaN or infinite in one and something else in the other."""

    def merged(self, other: Comparison) -> Comparison:
        """Of both tensors' elements together."""
        return Comparison(
            self.sum_sq + other.sum_sq,
            self.sum_sq_diff + other.sum_sq_diff,
            max(self.max_abs_diff, other.max_abs_diff),
            self.mismatched + other.mismatched,
        )


class UpdateComparison(NamedTuple):
    """Of two Adam update directions u (original) and w: sums over all elements where both are finite.

    All but `sum_sq_diff` leave out what is no update, as `UpdateSize` does.
    """

    sum_sq: float
    sum_sq_other: float
    sum_sq_diff: float
    dot: float
    max_abs: float
    max_abs_other: float
    nonfinite: int

    def merged(self, other: UpdateComparison) -> UpdateComparison:
        """Of both tensors' elements together."""
        return UpdateComparison(
            self.sum_sq + other.sum_sq,
            self.sum_sq_other + other.sum_sq_other,
            self.sum_sq_diff + other.sum_sq_diff,
            self.dot + other.dot,
            max(self.max_abs, other.max_abs),
            max(self.max_abs_other, other.max_abs_other),
            self.nonfinite + other.nonfinite,
        )


class UpdateSize(NamedTuple):
    """Of an Adam update direction: how many elements have one, and the sum of their squares."""

    numel: int
    sum_sq: float


class Size(NamedTuple):
    """Of a tensor's finite values: the sum of their squares, and the largest magnitude."""

    sum_sq: float
    largest: float


NO_DIFFERENCE = Comparison(0.0, 0.0, 0.0, 0)
NO_UPDATE = UpdateComparison(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def compare(a: Tensor, b: Tensor) -> Comparison:
    """Sum up how two tensors differ.

    Args:
        a: The original, flat: fp32 or fp64.
        b: The other, of the same dtype and size.

    Returns:
        Sums in fp64.
    """
    finite = a.isfinite() & b.isfinite()
    alike = finite | (a == b) | (a.isnan() & b.isnan())
    x, y = a[finite].to(torch.float64), b[finite].to(torch.float64)
    largest = float((y - x).abs().max()) if x.numel() else 0.0
    return Comparison(float((x * x).sum()), float(((y - x) ** 2).sum()), largest, int((~alike).sum()))


def compare_updates(
    m: Tensor, v: Tensor, m_other: Tensor, v_other: Tensor, *, correction1: float, correction2: float, eps: float
) -> UpdateComparison:
    """Sum up how two Adam updates u = (m / correction1) / (sqrt(v / correction2) + eps) differ.

    Args:
        m: First moment of the original: fp32, flat.
        v: Second moment of the original: fp32, flat.
        m_other: First moment of the other.
        v_other: Second moment of the other.
        correction1: 1 - beta1**t.
        correction2: 1 - beta2**t.
        eps: What is added to the root.

    Returns:
        Sums in fp64. m / eps from 1 on where v is 0 counts in `sum_sq_diff` alone: it may drown all others.
    """

    def update(first: Tensor, second: Tensor) -> Tensor:
        return (first.double() / correction1) / ((second.double() / correction2).sqrt() + eps)

    u, w = update(m, v), update(m_other, v_other)
    finite = u.isfinite() & w.isfinite()
    nonfinite = int((~finite).sum())
    u, w, root = u[finite], w[finite], v[finite]
    sum_sq_diff = float(((w - u) ** 2).sum())
    sound = (root > 0) | (u.abs() < 1)
    u, w = u[sound], w[sound]
    if not u.numel():
        return NO_UPDATE._replace(sum_sq_diff=sum_sq_diff, nonfinite=nonfinite)
    squares = (float((u * u).sum()), float((w * w).sum()), sum_sq_diff, float((u * w).sum()))
    return UpdateComparison(*squares, float(u.abs().max()), float(w.abs().max()), nonfinite)


def update_size(m: Tensor, v: Tensor, *, eps: float) -> UpdateSize:
    """Sum up how large u = m / (sqrt(v) + eps) is.

    Left out is what is no update: values that are not finite, negative v, and m / eps from 1 on where v is 0, which may
    drown all others.

    Args:
        m: First moment: fp32, flat.
        v: Second moment: fp32, flat.
        eps: What is added to the root.

    Returns:
        The number of elements that have an update, and their sum of squares, in fp64.
    """
    u = m.double() / (v.double().sqrt() + eps)
    u = u[u.isfinite() & ((v > 0) | (u.abs() < 1))]
    return UpdateSize(u.numel(), float((u * u).sum()))


def size(x: Tensor) -> Size:
    """Sum up how large the finite values of a tensor are.

    Args:
        x: fp32, flat.

    Returns:
        Sums in fp64.
    """
    finite = x[x.isfinite()].double()
    return Size(float((finite * finite).sum()), float(finite.abs().max()) if finite.numel() else 0.0)
