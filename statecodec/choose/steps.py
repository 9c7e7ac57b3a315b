"""Grids whose error is a stated fraction of one optimizer step: the codec of every tensor, in closed form.

A uniform grid of width d has an rms error of d / sqrt(12). So a fraction F of one step is a width of F * sqrt(12)
steps, and the only question is how long a step is:

    adam        exp_avg as a direction: rms of u = m_hat / (sqrt(v_hat) + eps) over the tensor
    weights     lr times that rms; for other optimizers lr times the rms of what they add
    momenta     of SGD and Lion their own rms; of Muon finer, for it amplifies small singular directions

Nothing is searched, sampled or tried. Where a step is not defined, the functions say what is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch

from statecodec.codecs import Codec, Direction, Logarithmic, Raw, Uniform
from statecodec.kernels.grids import MAX_PER_OCTAVE, MAX_STEP, MIN_STEP

Method = Literal["adam", "sgd", "lion", "muon"]

SPREAD: Final = math.sqrt(12)  # widths of a uniform grid in its rms error
FINEST: Final = 2.0**-14  # of a weight grid, in rms of the weights; a converged layer would ask for ever finer ones
COARSEST: Final = 2.0**-7.5  # of a weight grid: the error of bf16 on bell-shaped weights, or a little less
MUON: Final = 0.3  # share of the fraction that a Muon momentum gets: untested
_SIXTEEN: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Correction:
    """Adam's bias corrections after `step` steps: c1 = 1 - beta1**step, c2 = 1 - beta2**step."""

    c1: float
    c2: float
    eps: float

    @classmethod
    def at(cls, beta1: float, beta2: float, eps: float, step: float | None) -> Correction:
        """For an optimizer's settings; without a step, as after many."""
        if step is None:
            return cls(1.0, 1.0, eps)
        after = max(step, 1.0)
        return cls(1.0 - beta1**after if beta1 < 1 else 1.0, 1.0 - beta2**after if beta2 < 1 else 1.0, eps)


def exp_avg(fraction: float, update_rms: float, correction: Correction) -> Codec:
    """A first moment whose update direction is off by `fraction` of one step.

    Args:
        fraction: rms error over the tensor, in rms of its own update.
        update_rms: of u, without the elements whose second moment is 0 (`kernels.Backend.update_size`).
        correction: the bias corrections and Adam's eps.

    Returns:
        `direction`. Its error does not see how exp_avg_sq is stored. With eps = 0 the least that is allowed stands in.
    """
    root = math.sqrt(correction.c2)
    step = _legal(fraction * update_rms * SPREAD * correction.c1 / root)
    return Raw() if step is None else Direction(step, min(max(correction.eps * root, MIN_STEP), 1.0))


def exp_avg_sq(fraction: float) -> Codec:
    """A second moment, or amsgrad's largest one: 1 / sqrt(fraction) codes per octave.

    That is 10 at 1 % (1 % of the root), 3 at 10 % (3 %), 1 at a whole step (10 %): its error moves no direction that is
    stored, only those of later steps, so it need not fall as fast as the fraction.
    """
    return Logarithmic(min(max(round(fraction**-0.5), 1), MAX_PER_OCTAVE)) if fraction > 0 else Raw()


def momentum(fraction: float, rms: float, method: Method = "sgd") -> Codec:
    """A momentum that is no direction of Adam's (SGD, Lion, Muon, an exp_avg without exp_avg_sq): by its own rms."""
    step = _legal(fraction * (MUON if method == "muon" else 1.0) * rms * SPREAD)
    return Raw() if step is None else Uniform(step)


def update_rms(method: Method, shape: tuple[int, ...], own: float) -> float:
    """The rms of what one step of a method adds, over lr: `own` is the rms of u for adam, of the momentum for sgd."""
    if method == "lion":
        return 1.0  # a sign
    if method == "muon":  # an orthogonal matrix
        rows = shape[0] if shape else 1
        return 1.0 / math.sqrt(max(rows, math.prod(shape) // max(rows, 1), 1))
    return own


def weight(fraction: float, rms: float, lr: float | None, moved_rms: float | None, dtype: torch.dtype) -> Codec:
    """A weight that is off by `fraction` of one step of its own training, within what bf16 and 24 bits would give.

    Args:
        fraction: rms error, in rms of one step.
        rms: of the weights.
        lr: learning rate of its group (`learning_rate`); None if nothing says it.
        moved_rms: of what one step adds, over lr (`update_rms`); None for a weight that nothing trains.
        dtype: of the weights.

    Returns:
        `uniform`; the finest grid where there is no lr; `raw` for 16-bit weights, which are what the model runs on, and
        for weights without moments (frozen, or of inference alone).
    """
    if dtype in _SIXTEEN or moved_rms is None or not math.isfinite(rms):
        return Raw()
    wanted = fraction * (lr or 0.0) * moved_rms * SPREAD
    step = _legal(min(max(wanted, FINEST * rms), COARSEST * rms))
    return Raw() if step is None else Uniform(step)


def average(followed: Codec, dtype: torch.dtype) -> Codec:
    """A running average or a master of weights: on the grid of those that it follows, exact if they are exact."""
    return followed if isinstance(followed, Uniform) and dtype not in _SIXTEEN else Raw()


def learning_rate(lr: float | None, initial: float | None, others: Iterable[float | None]) -> float | None:
    """The lr that a step has: the group's own; at the end of a schedule, or without one, the initial or the largest.

    Args:
        lr: of the parameter's group, now.
        initial: `initial_lr` of the group, which schedulers leave there.
        others: of all groups of the file.
    """
    for found in (lr, initial, max((x for x in others if x is not None and math.isfinite(x)), default=None)):
        if found is not None and math.isfinite(found) and found > 0:
            return found
    return None


def _legal(step: float) -> float | None:
    """A width that a grid may have; None of values that have no size. Of zeros any width will do."""
    if not math.isfinite(step):
        return None
    return min(max(step, MIN_STEP), MAX_STEP) if step else 1.0
