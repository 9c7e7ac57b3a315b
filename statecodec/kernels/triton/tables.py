"""The inputs of a fused launch: its tables, and the record of compile-time constants.

`table` is int64 [FIELDS, parameters], fixed: addresses, shapes, how many groups a parameter has. `news` is int64
[parameters + NUMBERS]: the gradients' addresses (0: this parameter has none in this step), then the group's numbers as
the bits of float64. `scalars` is fp32 [SCALARS, parameters]: what depends on a parameter's count of steps, made by
`begin`. `chunks` is int32 [programs, 2]: parameter, first tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl

from statecodec.kernels.curves import Curve

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


@dataclass(frozen=True)
class Form:
    """How one state is stored: `absent`, `dense` (fp32), `shared` (dense, broadcast) or `companded` by a curve."""

    kind: str = "absent"
    bits: int = 0
    curve: int = 0
    top: int = 0
    signed: bool = False
    min_scale: int = 0
    per_octave: int = 0
    half_lowest: float = 0.0

    @staticmethod
    def of(curve: Curve | None) -> Form:
        """The form of a state with this curve; None: dense."""
        if curve is None:
            return Form("dense")
        return Form(
            "companded", curve.bits, curve.kind, curve.top, curve.signed, curve.min_scale, curve.per_octave,
            float(curve.levels[1]) * 0.5,
        )  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What is known when a fused step is compiled. A tile is `count` groups of `width` lanes, a program `run` tiles."""

    method: str  # adam, lion, sgd, foam, slim
    weight: str  # fp32, bf16, fp16
    low: int  # bits that extend the weight: 0, 8, 16
    gradient: str  # fp32, bf16, fp16
    m: Form
    v: Form
    block: int  # weights per folded moment
    maximize: bool
    l2: bool
    nesterov: bool
    stochastic: bool
    mean_of_squares: bool
    true_tail: bool
    decay_first: bool
    words: bool = False  # the fast step
    whole: bool = False  # groups tile aligned memory: rows do not matter and accesses are wide
    group: int = 0
    width: int = 0
    count: int = 0
    run: int = 0
