"""The inputs of a fused launch: its tables, and the record of compile-time constants.

`table` is int64 [FIELDS, parameters], fixed: addresses, shapes, how many groups a parameter has. `news` is int64
[parameters + NUMBERS]: the gradients' addresses (0: this parameter has none in this step), then the group's numbers as
the bits of float64. `scalars` is fp32 [SCALARS, parameters]: what depends on a parameter's count of steps, made by
`begin`. `chunks` is int32 [programs, 2]: parameter, first tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl

from statecodec.kernels.fused import StateStorage
from statecodec.kernels.triton.tiles import Tile

# OUTER x SHARED x INNER is the parameter as a shared second moment sees it: one value per outer and inner index, whose
# partial sums and new value lie at SCRATCH.
FIELDS = 16
(
    PARAM, LOW, M_DATA, M_SCALES, V_DATA, V_SCALES, STEP, SKIPPED, ROWS, COLS, GROUPS, INDEX, OUTER, SHARED, INNER,
    SCRATCH,
) = map(tl.constexpr, range(FIELDS))  # fmt: skip

NUMBERS = ("lr", "decay", "beta1", "beta2", "eps", "l2", "momentum", "dampening", "scale", "residual", "seed")
LR, WEIGHT_DECAY, BETA1, BETA2, EPS, L2, MOMENTUM, DAMPENING, SCALE, RESIDUAL, SEED = map(
    tl.constexpr, range(len(NUMBERS))
)

# DECAY_BY: what decoupled decay multiplies a weight with. SIZE: the step's. ROOT: of the second moment's bias
# correction, and its reciprocal. GAIN: of SGD's gradient. KEY: of the dither, as bits.
SCALARS = 6
DECAY_BY, SIZE, ROOT, RECIPROCAL, GAIN, KEY = map(tl.constexpr, range(SCALARS))


@dataclass(frozen=True, kw_only=True)
class Spec(Tile):
    """What is known when a fused step is compiled. A program takes `run` tiles."""

    method: str  # adam, lion, sgd, foam, slim
    weight: tl.dtype
    low: int  # bits that extend the weight: 0, 8, 16
    m: StateStorage | None
    v: StateStorage | None
    block: int  # weights per folded moment
    gradient: tl.dtype = tl.float32
    maximize: bool = False
    l2: bool = False
    nesterov: bool = False
    stochastic: bool = False
    mean_of_squares: bool = True
    true_tail: bool = True
    decay_first: bool = True
    words: bool = False  # the fast step; of a group, whether formats allow it
    run: int = 0

    @property
    def companded(self) -> bool:
        """Whether a moment is companded, so that its groups are units."""
        return any(state and state.curve for state in (self.m, self.v))

    @property
    def shared(self) -> bool:
        """Whether the second moment is shared along dimensions."""
        return self.v is not None and bool(self.v.dims)
