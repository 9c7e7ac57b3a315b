"""The inputs of a fused launch: its tables, the record of what is known when it is compiled, and what reads them.

`table` is int64 [parameters, FIELDS], fixed: addresses, shapes, how many groups a parameter has. `news` is int64
[NUMBERS + parameters]: the group's numbers as the bits of float64, then the gradients' addresses (0: this parameter has
none in this step). `scalars` is fp32 [parameters, SCALARS]: what the rules compute with, made by `begin`. `chunks` is
int32 [programs, 2]: parameter, first tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from statecodec.kernels.fused import StateStorage
from statecodec.kernels.triton.weights import Stored, dither_key

# OUTER x SHARED x INNER is the parameter as a shared second moment sees it: one value per outer and inner index, whose
# partial sums and new value lie at SCRATCH.
FIELDS = 16
(
    PARAM, LOW, M_DATA, M_SCALES, V_DATA, V_SCALES, STEP, SKIPPED, ROWS, COLS, GROUPS, INDEX, OUTER, SHARED, INNER,
    SCRATCH,
) = map(tl.constexpr, range(FIELDS))  # fmt: skip

NUMBERS = ("lr", "decay", "beta1", "beta2", "eps", "l2", "momentum", "dampening", "scale", "residual", "seed")
LR, WEIGHT_DECAY, BETA1, BETA2, EPS, L2, MOMENTUM, DAMPENING, SCALE, RESIDUAL, SEED = map(tl.constexpr, range(11))

# Options of a group that are fields of a `Spec`, too.
FLAGS = ("maximize", "nesterov", "stochastic", "mean_of_squares", "true_tail", "decay_first")

# What a rule computes with, in the order of `rule_numbers`; then KEY, of the dither, as bits.
SCALARS, KEY = tl.constexpr(14), tl.constexpr(13)
_FIELDS, _NUMBERS = tl.constexpr(FIELDS), tl.constexpr(len(NUMBERS))
LANES = tl.constexpr(128)  # parameters that a program of `begin` looks at


@dataclass(frozen=True, kw_only=True)
class Spec(Stored):
    """What is known when a fused step is compiled. A program takes `run` tiles."""

    method: str  # adam, lion, sgd, foam, slim
    m: StateStorage | None
    v: StateStorage | None
    block: int  # weights per folded moment
    gradient: tl.dtype = tl.float32
    maximize: bool = False
    l2: bool = False
    nesterov: bool = False
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


@triton.jit
def number(news, NUMBER: tl.constexpr):
    """One of the group's numbers, in float64."""
    return tl.load(news + NUMBER).to(tl.float64, bitcast=True)


@triton.jit
def own_chunk(news, table, chunks):
    """This program's chunk: parameter, its row of the table, its gradient's address (0: none), first tile."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    at = tl.load(chunk).to(tl.int64)
    return at, table + at * _FIELDS, tl.load(news + _NUMBERS + at), tl.load(chunk + 1)


@triton.jit
def addresses_of(fields):
    """The addresses of weight, low part, and both moments with their scales."""
    addresses = ()
    for field in tl.static_range(PARAM, STEP):
        addresses += (tl.load(fields + field),)
    return addresses


@triton.jit
def rule_numbers(scalars):
    """The rules' scalars of this parameter, rounded to fp32 once.

    What decoupled decay multiplies a weight with; the step's size; the root of the second moment's bias correction, and
    its reciprocal; the gain of SGD's gradient; beta1, 1 - beta1, beta2, 1 - beta2; eps; l2; momentum; FOAM's residual.
    """
    numbers = ()
    for at in tl.static_range(KEY):
        numbers += (tl.load(scalars + at),)
    return numbers


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for integers 0 <= exponent < 2**25: an fp32 counter counts no further."""
    result = exponent.to(tl.float64) * 0.0 + 1.0
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def begin(
    news, table, scalars, lr_tensor, count: tl.int64, METHOD: tl.constexpr, LR_TENSOR: tl.constexpr,
    TORCH_BIAS: tl.constexpr,
):  # fmt: skip
    """Count this step in every parameter that has a gradient; its scalars, in float64, rounded to fp32 once."""
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = at < count
    live = live & (tl.load(news + _NUMBERS + at, mask=live, other=0) != 0)
    counter = tl.load(table + at * _FIELDS + STEP, mask=live, other=0).to(tl.pointer_type(tl.float32))
    steps = tl.load(counter, mask=live, other=0.0) + 1.0
    tl.store(counter, steps, mask=live)
    lr = number(news, LR)
    if LR_TENSOR:
        lr = tl.load(lr_tensor).to(tl.float64)
    n = steps.to(tl.int32)
    beta1, beta2 = number(news, BETA1), number(news, BETA2)
    c1 = 1.0 - _power(beta1, n)
    root = tl.sqrt(1.0 - _power(beta2, n))
    size, gain = lr, c1 * 0.0 + 1.0
    if METHOD == "adam" or METHOD == "slim":
        size = lr / c1
    if METHOD == "foam":
        size = lr * number(news, SCALE) / c1
        if not TORCH_BIAS:
            size = lr * number(news, SCALE) * root / c1
            root = root * 0.0 + 1.0
    if METHOD == "sgd":
        gain = tl.where(n == 1, 1.0, 1.0 - number(news, DAMPENING))
    root = root.to(tl.float32)
    found = (
        1.0 - lr * number(news, WEIGHT_DECAY), size, root, tl.div_rn(root * 0.0 + 1.0, root), gain,
        beta1, 1.0 - beta1, beta2, 1.0 - beta2, number(news, EPS), number(news, L2),
        number(news, MOMENTUM), number(news, RESIDUAL),
    )  # fmt: skip
    for row in tl.static_range(KEY):
        tl.store(scalars + at * SCALARS + row, found[row].to(tl.float32), mask=live)
    key = dither_key(tl.load(news + SEED), tl.load(table + at * _FIELDS + INDEX, mask=live, other=0), n)
    tl.store(scalars + at * SCALARS + KEY, key.to(tl.float32, bitcast=True), mask=live)
