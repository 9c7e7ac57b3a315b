"""Companded quantisation in Triton: how states are stored, for the fused steps and for the stand-alone kernels.

Same bits as `reference.companding`, which takes groups of more than WIDEST values itself: its torch operations round
alike on every device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import curves
from statecodec.kernels.curves import Curve
from statecodec.kernels.reference import companding as reference
from statecodec.kernels.triton import words
from statecodec.kernels.triton.runtime import decode_table, flag_word, flags_on_host, on, run
from statecodec.kernels.triton.tiles import WIDEST, load_float, places, pointer, tiled
from statecodec.kernels.triton.words import INF_BITS, bits, magnitude_bits, quotient, rounded_reciprocal, value

_LINEAR, _SOFTSIGN, _LOG = (tl.constexpr(k) for k in (curves.LINEAR, curves.SOFTSIGN, curves.LOG))
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in curves.LOG2)
_BF16_MAX = tl.constexpr(0x7F7F)


# --- arithmetic


@triton.jit
def log2_of_mantissa(x_bits):
    """log2 of an fp32 number's mantissa, from 1 to 2: the polynomial of `curves.LOG2`, every operation rounded."""
    f = value((x_bits & 0x7FFFFF) | 0x3F800000) - 1.0
    return f * (_C0 + f * (_C1 + f * (_C2 + f * _C3)))


@triton.jit
def scale_bits(absmax_bits, MIN_SCALE: tl.constexpr):
    """bf16 bits of a group's scale: nearest even, finite, never 0 for a group that is not all zero."""
    top = tl.minimum(absmax_bits, INF_BITS)
    return tl.where(top > 0, tl.minimum(tl.maximum(words.nearest_bf16(top), MIN_SCALE), _BF16_MAX), 0)


@triton.jit
def ratio(magnitude, scale):
    """min(magnitude / scale, 1), correctly rounded wherever a code could depend on it; 0 in a group of zeros.

    `scale` are bf16 bits that broadcast. Division by one number of many others (Markstein): both sides are brought near
    1 by an exact power of two, the reciprocal is rounded once per group, and one fused remainder step makes the
    quotient correctly rounded. Only quotients below 2**-60 can be off by an ulp, far below every curve's lowest
    threshold. A bf16 divisor is never the theorem's exception.
    """
    exponent = tl.minimum(tl.maximum(254 - (scale >> 7), 1), 253)
    power = value(exponent << 23)
    divisor = tl.where(scale > 0, value(scale << 16) * power, 1.0)  # the magnitudes of such a group are all 0
    result = quotient(magnitude * power, divisor, rounded_reciprocal(divisor))
    return tl.minimum(result, 1.0)  # 1 for NaN too, which only a refused tensor can hold


@triton.jit
def codes_of(r, CURVE: tl.constexpr):
    """Codes 0..top (int32) of magnitudes r in [0, 1]."""
    if CURVE.kind == _LOG:
        within = (log2_of_mantissa(bits(r)) * CURVE.per_octave + 0.5).to(tl.int32)
        code = CURVE.top + ((bits(r) >> 23) - 127) * CURVE.per_octave + within
        code = tl.minimum(tl.maximum(code, 1), CURVE.top)
        if CURVE.signed:  # without a sign nothing but 0 becomes 0, so there is no half of the lowest level
            code = tl.where(r >= CURVE.half_lowest, code, 0)
    else:
        if CURVE.kind == _LINEAR:
            y = r
        elif CURVE.kind == _SOFTSIGN:
            above = 1.0 + r
            y = quotient(r + r, above, rounded_reciprocal(above))
        else:
            y = words.root(r)
        code = (y * CURVE.top + 0.5).to(tl.int32)
    return code


@triton.jit
def quantise(x, scale, CURVE: tl.constexpr):
    """Codes (int32, signed) of fp32 `x` under scales (bf16 bits) that broadcast over it."""
    code = codes_of(ratio(tl.abs(x), scale), CURVE)
    if CURVE.signed:
        code = tl.where(x < 0, -code, code)
    else:
        code = tl.where(magnitude_bits(x) > 0, tl.maximum(code, 1), 0)
    return code


@triton.jit
def largest_bits(x, SIGNED: tl.constexpr):
    """The largest bits in each group (uint32): from those of infinity on, the group holds what is refused."""
    return tl.max(magnitude_bits(x).to(tl.uint32, bitcast=True) if SIGNED else words.unsigned_bits(x), axis=1)


# --- in memory; `here` is what `places` found


@triton.jit
def load_groups(codes, scales, table, here, BITS: tl.constexpr, TILE: tl.constexpr):
    """fp32 values [count, width] of companded groups."""
    index, offset, inside, packed, packed_inside, exists = here
    WIDE: tl.constexpr = TILE.whole
    if BITS == 4:  # even elements lie in the low nibble
        pair = tl.load(pointer(codes, tl.uint8, WIDE) + packed, mask=packed_inside, other=0).to(tl.int32)
        code = tl.reshape(tl.join(pair & 0xF, pair >> 4), [TILE.count, TILE.width])
    else:
        code = tl.load(pointer(codes, tl.uint8, WIDE) + offset, mask=inside, other=0).to(tl.int32)
    scale = tl.load(pointer(scales, tl.int16, WIDE) + index, mask=exists, other=0).to(tl.int32)
    return words.looked_up(table, code) * value(scale << 16)[:, None]


@triton.jit
def store_groups(x, largest, good, codes, scales, here, CURVE: tl.constexpr, TILE: tl.constexpr):
    """The inverse of `load_groups`, for `good` groups; `largest` holds their largest bits."""
    index, offset, inside, packed, packed_inside, _ = here
    WIDE: tl.constexpr = TILE.whole
    scale = scale_bits(largest.to(tl.int32, bitcast=True), CURVE.min_scale)
    tl.store(pointer(scales, tl.int16, WIDE) + index, scale.to(tl.int16), mask=good)
    code = quantise(x, scale[:, None], CURVE)
    if CURVE.bits == 4:
        even, odd = tl.split(tl.reshape(code & 0xF, [TILE.count, TILE.width // 2, 2]))
        pair = (even | (odd << 4)).to(tl.uint8)
        tl.store(pointer(codes, tl.uint8, WIDE) + packed, pair, mask=packed_inside & good[:, None])
    else:
        tl.store(pointer(codes, tl.uint8, WIDE) + offset, code.to(tl.uint8), mask=inside & good[:, None])


@triton.jit
def load_state(data, scales, table, here, STATE: tl.constexpr, SPEC: tl.constexpr):
    """fp32 values [count, width] of a state, dense or companded."""
    if STATE.curve is None:
        state = load_float(data, here[1], here[2], tl.float32, SPEC.whole)
    else:
        state = load_groups(data, scales, table, here, STATE.curve.bits, SPEC)
    return state


@triton.jit
def store_state(state, data, scales, here, good, STATE: tl.constexpr, SPEC: tl.constexpr):
    """The inverse of `load_state`, for `good` groups (or, of a dense state, good elements) only."""
    if STATE.curve is None:
        tl.store(pointer(data, tl.float32, SPEC.whole) + here[1], state, mask=here[2] & good)
    else:
        CURVE: tl.constexpr = STATE.curve
        good_groups = here[5] & (tl.min(good.to(tl.int32), axis=1) != 0)
        state = tl.where(good_groups[:, None], state, 0.0)  # saves registers
        store_groups(state, largest_bits(state, CURVE.signed), good_groups, data, scales, here, CURVE, SPEC)


# --- alone


@triton.jit
def _encode(x_ptr, codes, scales, refused, rows: tl.int64, cols: tl.int64, CURVE: tl.constexpr, TILE: tl.constexpr):
    here, _, _, _ = places(rows, cols, tl.program_id(0).to(tl.int64) * TILE.count, TILE)
    x = tl.load(x_ptr + here[1], mask=here[2], other=0.0)
    largest = largest_bits(x, CURVE.signed)
    # This notes only that a value is refused; `flags_of` then computes the flags. All threads of a group write the
    # same value: no atomic, no barrier.
    tl.store(refused + here[0] * 0, 1, mask=largest >= INF_BITS)
    store_groups(x, largest, here[5], codes, scales, here, CURVE, TILE)


@triton.jit
def _decode(codes, scales, table, out, rows: tl.int64, cols: tl.int64, BITS: tl.constexpr, TILE: tl.constexpr):
    here, _, _, _ = places(rows, cols, tl.program_id(0).to(tl.int64) * TILE.count, TILE)
    tl.store(out + here[1], load_groups(codes, scales, table, here, BITS, TILE), mask=here[2])


def encode_companded(x: Tensor, codes: Tensor, scales: Tensor, *, curve: Curve, group: int) -> int:
    """See `reference.companding.encode_companded`. Reading the flags synchronises with the device, once."""
    group = within_row(group, x)
    with on(x):
        if group > WIDEST:
            return reference.encode_companded(x, codes, scales, curve=curve, group=group)
        tile, programs = tiled(group, x, codes, scales)
        refused = flag_word(x)
        run(_encode, programs, x, codes, scales, refused, *x.shape, CURVE=curve, TILE=tile)
        return flags_of(x, signed=curve.signed) if flags_on_host(refused) else 0


def flags_of(x: Tensor, *, signed: bool) -> int:
    """The flags of a tensor that is known to hold a value that is refused."""
    flags = kernels.NAN * bool(x.isnan().any()) | kernels.INF * bool(x.isinf().any())
    return flags if signed else flags | kernels.NEGATIVE * bool((x < 0).any())


def decode_companded(codes: Tensor, scales: Tensor, out: Tensor, *, curve: Curve, group: int) -> None:
    """See `reference.companding.decode_companded`."""
    group = within_row(group, out)
    with on(out):
        if group > WIDEST:
            reference.decode_companded(codes, scales, out, curve=curve, group=group)
        else:
            tile, programs = tiled(group, out, codes, scales)
            table = decode_table(curve, out.device)
            run(_decode, programs, codes, scales, table, out, *out.shape, BITS=curve.bits, TILE=tile)


def within_row(group: int, x: Tensor) -> int:
    """The group size, or the row if that is smaller; even, because two codes of 4 bits share a byte."""
    cols = x.shape[1]
    return max(2, min(group, cols + cols % 2))
