"""The fused step of the usual case: bf16 weights with 8 more bits, bf16 gradients, 8-bit moments in groups of 32.

Each program steps a run of tiles of one parameter. A tile is read as words (see `words`): [threads, 2], eight values a
thread, so that loads and stores are wide and every value exists as one of four planes. Four threads hold a group; they
share its largest value by two shuffles. The next tile is loaded before the present one is computed. There is no
barrier, no branch and no call in the loop, and the results are those of the generic path, bit for bit: softsign codes
are divided out, square-root codes squared, instead of looked up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton import words
from statecodec.kernels.triton.rules import LARGEST_BITS, UP, UP_BITS, stepped
from statecodec.kernels.triton.runtime import INTERPRETED
from statecodec.kernels.triton.tables import addresses_of, own_chunk, rule_numbers
from statecodec.kernels.triton.tiles import pointer

GROUP, COUNT, RUN = 32, 1024 if INTERPRETED else 32, 8
THREADS = tl.constexpr(4)  # of a group
_WORDS = tl.constexpr(2)  # of a thread
_SQUARE, _SQUARE_REST = tl.constexpr(1.537870048196055e-05), tl.constexpr(1.784721797974155e-14)  # 1 / 255**2
_LOWEST_RATIO = tl.constexpr(1.54e-05)  # just above the square of code 1's lower half: a positive value gets code 1
_SCALE, _SCALE_UP = tl.constexpr(1 << 23), tl.constexpr((1 + 56) << 23)  # bits of 2**-126, the smallest scale


@triton.jit
def step_words(news, table, chunks, scalars, m_table, v_table, SPEC: tl.constexpr):
    """One chunk: SPEC.run tiles of SPEC.count groups, from the first of the chunk on."""
    at, fields, gradient, first = own_chunk(news, table, chunks)
    if gradient != 0:
        groups = tl.load(fields + t.GROUPS).to(tl.int32)
        first = first * SPEC.count
        param, low, m, m_scales, v, v_scales = addresses_of(fields)
        places = (
            pointer(param, tl.int64, True), pointer(low, tl.int32, True), pointer(gradient, tl.int64, True),
            pointer(m, tl.int32, True), pointer(m_scales, tl.int16, False), pointer(v, tl.int32, True),
            pointer(v_scales, tl.int16, False),
        )  # fmt: skip
        numbers = rule_numbers(scalars + at * t.SCALARS)
        tiles = tl.minimum((groups - first + SPEC.count - 1) // SPEC.count, SPEC.run)
        now, kept = fetch(places, first, groups, SPEC), tl.zeros([SPEC.count * THREADS], tl.int32)
        for tile in range(tiles):
            following = first + SPEC.count
            # After the last tile nothing is left to load: the mask is empty.
            after = fetch(places, following, tl.where(tile + 1 < tiles, groups, following), SPEC)
            kept += finish(now, places, numbers, first, groups, SPEC)
            now = after
            first = following
        skipped = tl.load(fields + t.SKIPPED).to(tl.pointer_type(tl.float32))
        tl.atomic_add(skipped + tl.zeros_like(kept), kept.to(tl.float32), mask=kept > 0, sem="relaxed")


@triton.jit
def lanes(first, groups, SPEC: tl.constexpr):
    """For each thread: its words from the tile's start, its group from there, whether that exists; the tile's start."""
    thread = tl.arange(0, SPEC.count * THREADS)
    group = thread // THREADS
    within = (thread * _WORDS)[:, None] + tl.arange(0, _WORDS)[None, :]
    return within, group, group < groups - first, first.to(tl.int64)


@triton.jit
def fetch(places, first, groups, SPEC: tl.constexpr):
    """The stored words of one tile: weight, low part, gradient, first moment and its scales, second and its scales."""
    weight, low, gradient, m, m_scales, v, v_scales = places
    within, group, live, start = lanes(first, groups, SPEC)
    mask = live[:, None]
    at = start * 8
    high = tl.load(weight + at + within, mask=mask)
    rest = tl.load(low + at + within, mask=mask)
    g = tl.load(gradient + at + within, mask=mask)
    mc = tl.load(m + at + within, mask=mask)
    ms = tl.load(m_scales + start + group, mask=live)
    vc = tl.load(v + at + within, mask=mask) if SPEC.v is not None else mc
    vs = tl.load(v_scales + start + group, mask=live) if SPEC.v is not None else ms
    return high, rest, g, mc, ms, vc, vs


@triton.jit
def finish(now, places, numbers, first, groups, SPEC: tl.constexpr):
    """Step one tile and store it, but for groups that would not be finite; returns those, each in one thread."""
    high, rest, g, mc, ms, vc, vs = now
    weight, low, _, m, m_scales, v, v_scales = places
    within, group, live, start = lanes(first, groups, SPEC)
    g0, g1, g2, g3 = words.bf16_values(g)
    w0, w1, w2, w3 = words.joined(high, rest)
    c0, c1, c2, c3 = words.codes(mc, True)
    d0, d1, d2, d3 = words.codes(vc, False)
    scales = words.value(ms.to(tl.int32) << 16)[:, None], words.value(vs.to(tl.int32) << 16)[:, None]
    w0, m0, v0 = plane(w0, g0, c0, d0, scales, numbers, SPEC)
    w1, m1, v1 = plane(w1, g1, c1, d1, scales, numbers, SPEC)
    w2, m2, v2 = plane(w2, g2, c2, d2, scales, numbers, SPEC)
    w3, m3, v3 = plane(w3, g3, c3, d3, scales, numbers, SPEC)
    w_top, m_top = largest(w0, w1, w2, w3, SPEC), largest(m0, m1, m2, m3, SPEC)
    bad = (w_top >= LARGEST_BITS) | (m_top >= LARGEST_BITS)
    if SPEC.v is not None:
        v_top = largest(v0, v1, v2, v3, SPEC)
        bad = bad | (v_top >= LARGEST_BITS + UP_BITS)
    bad = bad & live
    good = live & (bad == 0)
    mask = good[:, None]
    once = tl.arange(0, SPEC.count * THREADS) % THREADS == 0
    at = start * 8
    high, rest = words.divided(w0, w1, w2, w3)
    tl.store(weight + at + within, high, mask=mask)
    tl.store(low + at + within, rest, mask=mask)
    scale = bf16_scale(m_top, _SCALE)
    tl.store(m + at + within, packed_codes(m0, m1, m2, m3, words.value(scale), True), mask=mask)
    tl.store(m_scales + start + group, tl.where(m_top > 0, scale >> 16, 0).to(tl.int16), mask=good & once)
    if SPEC.v is not None:
        scale = bf16_scale(v_top, _SCALE_UP)
        tl.store(v + at + within, packed_codes(v0, v1, v2, v3, words.value(scale), False), mask=mask)
        scale = tl.where(v_top > 0, (scale - UP_BITS) >> 16, 0)
        tl.store(v_scales + start + group, scale.to(tl.int16), mask=good & once)
    return (bad & once).to(tl.int32)


@triton.jit
def plane(w, g, c, d, scales, numbers, SPEC: tl.constexpr):
    """One plane of the step: (weight, first moment, second moment times 2**56), from the codes of the moments."""
    m_scale, v_scale = scales
    denominator = 254.0 - tl.abs(c)
    m = words.quotient(c, denominator, words.reciprocal(denominator)) * m_scale
    square = d * d
    v = tl.fma(square, _SQUARE, square * _SQUARE_REST) * v_scale
    w, m, v = stepped(w, g, m, v, numbers, SPEC)
    return w, m, v * UP


@triton.jit
def largest(a, b, c, d, SPEC: tl.constexpr):
    """The bits of the largest magnitude in each group, in every thread of it; NaN is the largest."""
    top = words.larger(words.larger(tl.abs(a), tl.abs(b)), words.larger(tl.abs(c), tl.abs(d)))
    top = tl.reshape(tl.max(words.bits(top) & 0x7FFFFFFF, axis=1), [SPEC.count, THREADS])
    spread = tl.broadcast_to(tl.max(top, axis=1)[:, None], [SPEC.count, THREADS])
    return tl.reshape(spread, [SPEC.count * THREADS])


@triton.jit
def bf16_scale(top, LOWEST: tl.constexpr):
    """A scale in bf16, as fp32 bits: nearest even, not below LOWEST."""
    return tl.maximum(words.nearest_bf16(top) << 16, LOWEST)


@triton.jit
def packed_codes(a, b, c, d, scale, FIRST: tl.constexpr):
    """Codes of four planes, as a word: softsign codes of FIRST moments, square-root codes of second ones."""
    y = words.rounded_reciprocal(scale)
    rest = (tl.fma(words.negated(scale), y, 1.0) * y)[:, None]  # 1 / scale in two parts
    y = y[:, None]
    if FIRST:
        a, b = softsign_code(a, y, rest), softsign_code(b, y, rest)
        c, d = softsign_code(c, y, rest), softsign_code(d, y, rest)
    else:
        a, b = root_code(a, y, rest), root_code(b, y, rest)
        c, d = root_code(c, y, rest), root_code(d, y, rest)
    return words.packed_bytes(a, b, c, d, 0 if FIRST else 1)


@triton.jit
def softsign_code(x, y, rest):
    """254 r / (1 + |r|) with r = x / scale, rounded half away from zero."""
    r = tl.fma(x, y, x * rest)
    d = 1.0 + tl.abs(r)
    q = words.quotient(r, d, words.reciprocal(d)) * 254.0
    return (q + words.value((words.bits(q) & (-0x7FFFFFFF - 1)) | 0x3F000000)).to(tl.int32)


@triton.jit
def root_code(x, y, rest):
    """255 sqrt(x / scale), rounded half up and at least 1 where x is positive; in byte 1."""
    r = tl.maximum(tl.fma(x, y, x * rest), _LOWEST_RATIO)
    y = words.reciprocal_root(r)
    q = r * y
    q = tl.fma(tl.fma(words.negated(q), q, r), 0.5 * y, q) * 255.0
    return words.floor_in_byte_one(q, words.is_positive(x))
