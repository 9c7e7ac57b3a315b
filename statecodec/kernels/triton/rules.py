"""The update rules, shared by both fused steps.

They are those of `reference.steps`, in the order of operations of `cpu.steps`, every operation rounded separately.
`numbers` are `tables.rule_numbers`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import words
from statecodec.kernels.triton.words import magnitude_bits

LARGEST_BITS = tl.constexpr((127 + 64) << 23)  # of `kernels.fused.LARGEST`
_LARGEST_BITS_FP16 = tl.constexpr(0x477FF000)  # of LARGEST_FP16
# The words' step carries averaged second moments times 2**56, their square roots times 2**28: MUFU flushes what is
# subnormal, and corrections need some bits below the result.
UP_BITS, UP = tl.constexpr(56 << 23), tl.constexpr(2.0**56)
_ROOT_UP, _ROOT_DOWN = tl.constexpr(2.0**28), tl.constexpr(2.0**-28)


@triton.jit
def stepped(w, g, m, v, numbers, SPEC: tl.constexpr):
    """Weight and moments after one step of adam, slim (whose v is new already), lion or sgd."""
    decay, size, root, reciprocal, gain, keep_1, rate_1, keep_2, rate_2, eps, l2, heavy, _residual = numbers
    if SPEC.maximize:
        g = words.negated(g)
    if SPEC.l2:
        g = tl.fma(w, l2, g)  # torch's add(alpha=) is a fused operation, on CPUs and on GPUs
    if SPEC.method == "adam" or SPEC.method == "slim":
        m = average(m, g, rate_1)
        if SPEC.method == "adam":
            v = v * keep_2 + rate_2 * g * g
        w = w * decay - size * direction(m, v, root, reciprocal, eps, SPEC.words)
    elif SPEC.method == "lion":
        u = average(g, m, keep_1)
        w = w * decay - tl.where(u > 0, size, tl.where(u < 0, 0.0 - size, 0.0))
        m = average(m, g, rate_2)
    elif SPEC.m is None:
        w = tl.fma(g, 0.0 - size, w * decay)
    else:
        m = m * heavy + gain * g
        w = w * decay - size * (g + heavy * m if SPEC.nesterov else m)
    return w, m, v


@triton.jit
def average(m, g, rate):
    """The exponential average: m + rate * (g - m)."""
    return m + rate * (g - m)


@triton.jit
def direction(m, v, root, reciprocal, eps, FAST: tl.constexpr):
    """m / (sqrt(v) / root + eps). FAST: from approximations, exact where moments come from 8-bit codes."""
    if FAST:
        divisor = words.quotient(words.root(v * UP), root * _ROOT_UP, reciprocal * _ROOT_DOWN) + eps
        u = words.quotient(m, divisor, words.rounded_reciprocal(divisor))
    else:
        u = tl.div_rn(m, words.quotient(tl.sqrt_rn(v), root, reciprocal) + eps)
    return u


@triton.jit
def too_large(x):
    """Whether a new value must not be stored: NaN, infinite, or not below LARGEST."""
    return magnitude_bits(x) >= LARGEST_BITS


@triton.jit
def weight_too_large(w, SPEC: tl.constexpr):
    """Whether a new weight must not be stored; fp16 has a lower limit."""
    return magnitude_bits(w) >= (_LARGEST_BITS_FP16 if SPEC.weight == tl.float16 else LARGEST_BITS)
