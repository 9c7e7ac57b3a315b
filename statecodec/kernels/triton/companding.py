"""Companded quantisation in Triton: the device arithmetic, shared with the fused steps, and the stand-alone kernels.

Same bits as `reference.companding`. A tile is [groups, width]: `width` is the group size rounded up to a power of two,
and the lanes beyond a group or a row are masked. Addresses are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import curves
from statecodec.kernels.curves import Curve
from statecodec.kernels.triton.runtime import (
    INTERPRETED,
    OPTIONS,
    TILE,
    decode_table,
    flag_word,
    flags_on_host,
    on,
    power_of_two,
)
from statecodec.kernels.triton.tables import Form
from statecodec.kernels.triton.words import looked_up, quotient, root, rounded_reciprocal

_LINEAR, _SOFTSIGN, _LOG = (tl.constexpr(k) for k in (curves.LINEAR, curves.SOFTSIGN, curves.LOG))
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in curves.LOG2)
_MAGNITUDE, _INF_BITS, _BF16_MAX = (tl.constexpr(b) for b in (0x7FFFFFFF, 0x7F800000, 0x7F7F))

WIDEST = TILE if INTERPRETED else 4096  # a group up to this size is held in registers; a larger one is read twice


@triton.jit
def magnitude_bits(x):
    """Bits of |x|: they order like the magnitudes, with infinity and NaN on top."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def unsigned_bits(x):
    """Bits of fp32 `x` as uint32: from those of infinity on they are what is not a number from 0 on (-0.0 is one)."""
    return (x + 0.0).to(tl.uint32, bitcast=True)


@triton.jit
def log2_of_mantissa(bits):
    """log2 of an fp32 number's mantissa, from 1 to 2: the polynomial of `curves.LOG2`, every operation rounded."""
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    return f * (_C0 + f * (_C1 + f * (_C2 + f * _C3)))


@triton.jit
def scale_bits(absmax_bits, MIN_SCALE: tl.constexpr):
    """bf16 bits of a group's scale: nearest even, finite, never 0 for a group that is not all zero."""
    bits = tl.minimum(absmax_bits, _INF_BITS)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(bits > 0, tl.minimum(tl.maximum(rounded, MIN_SCALE), _BF16_MAX), 0)


@triton.jit
def scale_value(bits):
    """The fp32 value of bf16 bits held in an int32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def ratio(magnitude, scale_bits):
    """min(magnitude / scale, 1), correctly rounded wherever a code could depend on it; 0 in a group of zeros.

    `scale_bits` broadcasts. Division by one number of many others (Markstein): both sides are brought near 1 by an
    exact power of two, the reciprocal is rounded once per group, and one fused remainder step makes the quotient
    correctly rounded. Only quotients below 2**-60 can be off by an ulp, far below every curve's lowest threshold. A
    bf16 divisor is never the theorem's exception.
    """
    exponent = tl.minimum(tl.maximum(254 - (scale_bits >> 7), 1), 253)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    divisor = tl.where(scale_bits > 0, scale_value(scale_bits) * power, 1.0)  # the magnitudes of such a group are all 0
    result = quotient(magnitude * power, divisor, rounded_reciprocal(divisor))
    return tl.minimum(result, 1.0)  # 1 for NaN too, which only a refused tensor can hold


@triton.jit
def codes_of(r, FORM: tl.constexpr):
    """Codes 0..top (int32) of magnitudes r in [0, 1]."""
    if FORM.curve == _LOG:
        bits = r.to(tl.int32, bitcast=True)
        within = (log2_of_mantissa(bits) * FORM.per_octave + 0.5).to(tl.int32)
        code = FORM.top + ((bits >> 23) - 127) * FORM.per_octave + within
        code = tl.minimum(tl.maximum(code, 1), FORM.top)
        if FORM.signed:  # without a sign nothing but 0 becomes 0, so there is no half of the lowest level
            code = tl.where(r >= FORM.half_lowest, code, 0)
    else:
        if FORM.curve == _LINEAR:
            y = r
        elif FORM.curve == _SOFTSIGN:
            above = 1.0 + r
            y = quotient(r + r, above, rounded_reciprocal(above))
        else:
            y = root(r)
        code = (y * FORM.top + 0.5).to(tl.int32)
    return code


@triton.jit
def quantise(x, scale_bits, FORM: tl.constexpr):
    """Codes (int32, signed) of fp32 `x` under scales that broadcast over it."""
    code = codes_of(ratio(tl.abs(x), scale_bits), FORM)
    if FORM.signed:
        code = tl.where(x < 0, -code, code)
    else:
        code = tl.where(magnitude_bits(x) > 0, tl.maximum(code, 1), 0)
    return code


@triton.jit
def pack_nibbles(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] codes to [ROWS, WIDTH / 2] bytes (int32), even elements in the low nibble."""
    even, odd = tl.split(tl.reshape(codes & 0xF, [ROWS, WIDTH // 2, 2]))
    return even | (odd << 4)


@triton.jit
def unpack_nibbles(packed, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `pack_nibbles`, on int32."""
    return tl.reshape(tl.join(packed & 0xF, packed >> 4), [ROWS, WIDTH])


@triton.jit
def group_bounds(rows, cols, groups, start, group, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """For COUNT groups from `start` on: element offset of each, and how many elements it has (0 past the last row)."""
    index = start + tl.arange(0, COUNT)
    if EVEN:
        begin = index * group
        size = tl.where(index < rows * groups, group, 0)
    else:
        row = index // groups
        first = (index - row * groups) * group
        begin = row * cols + first
        size = tl.where(row < rows, tl.minimum(cols - first, group), 0)
    return index, begin, size


@triton.jit
def inside_groups(column, size, WHOLE: tl.constexpr):
    """Which lanes of a tile hold an element."""
    # With whole groups the mask is the same along a group: so the compiler can use wide loads and stores.
    if WHOLE:
        inside = (size > 0)[:, None] & (column >= 0)[None, :]
    else:
        inside = column[None, :] < size[:, None]
    return inside


@triton.jit
def codes_at(
    index, begin, size, cols, groups, CHUNK: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, NIBBLES: tl.constexpr,
):  # fmt: skip
    """Where the codes of groups lie, in bytes, and which of these bytes there are."""
    if NIBBLES:
        pair = tl.arange(0, WIDTH // 2) + CHUNK * (WIDTH // 2)
        if EVEN:
            first = index * (GROUP // 2)
        else:
            row = index // groups
            first = row * ((cols + 1) // 2) + (begin - row * cols) // 2
        offset, inside = first[:, None] + pair[None, :], inside_groups(pair if WHOLE else 2 * pair, size, WHOLE)
    else:
        lane = CHUNK * WIDTH + tl.arange(0, WIDTH)
        offset, inside = begin[:, None] + lane[None, :], inside_groups(lane, size, WHOLE)
    return offset, inside


@triton.jit
def _encode(
    x_ptr, codes_ptr, scales_ptr, flags_ptr, rows: tl.int64, cols: tl.int64, groups: tl.int64,
    GROUP: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * COUNT
    index, begin, size = group_bounds(rows, cols, groups, start, GROUP, COUNT, EVEN)
    top = tl.zeros([COUNT], tl.uint32)
    for chunk in tl.static_range(CHUNKS):
        at, inside = codes_at(index, begin, size, cols, groups, chunk, GROUP, WIDTH, EVEN, WHOLE, False)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        bits = magnitude_bits(x).to(tl.uint32, bitcast=True) if FORM.signed else unsigned_bits(x)
        top = tl.maximum(top, tl.max(bits, axis=1))
    # This notes only that a value is refused; `flags_of` then computes the flags. All threads of a group write the
    # same value: no atomic, no barrier.
    tl.store(flags_ptr + index * 0, 1, mask=top >= _INF_BITS)
    scale = scale_bits(top.to(tl.int32, bitcast=True), FORM.min_scale)
    tl.store(scales_ptr + index, scale.to(tl.int16), mask=size > 0)
    for chunk in tl.static_range(CHUNKS):
        if CHUNKS > 1:  # a wide group is read a second time, mostly from L2
            at, inside = codes_at(index, begin, size, cols, groups, chunk, GROUP, WIDTH, EVEN, WHOLE, False)
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
        code = quantise(x, scale[:, None], FORM)
        if FORM.bits == 4:
            code = pack_nibbles(code, COUNT, WIDTH)
        at, inside = codes_at(index, begin, size, cols, groups, chunk, GROUP, WIDTH, EVEN, WHOLE, FORM.bits == 4)
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=inside)


@triton.jit
def _decode(
    codes_ptr, scales_ptr, table_ptr, out_ptr, rows: tl.int64, cols: tl.int64, groups: tl.int64,
    GROUP: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, NIBBLES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * COUNT
    index, begin, size = group_bounds(rows, cols, groups, start, GROUP, COUNT, EVEN)
    scale = scale_value(tl.load(scales_ptr + index, mask=size > 0, other=0).to(tl.int32))
    for chunk in tl.static_range(CHUNKS):
        at, inside = codes_at(index, begin, size, cols, groups, chunk, GROUP, WIDTH, EVEN, WHOLE, NIBBLES)
        code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
        if NIBBLES:
            code = unpack_nibbles(code, COUNT, WIDTH)
        at, inside = codes_at(index, begin, size, cols, groups, chunk, GROUP, WIDTH, EVEN, WHOLE, False)
        tl.store(out_ptr + at, looked_up(table_ptr, code) * scale[:, None], mask=inside)


def encode_companded(x: Tensor, codes: Tensor, scales: Tensor, *, curve: Curve, group: int) -> int:
    """See `reference.companding.encode_companded`. Reading the flags synchronises with the device, once."""
    rows, cols = x.shape
    with on(x):
        if not rows or not cols:
            return 0
        flags = flag_word(x)
        shape = _shape(rows, cols, group, curve.bits)
        _encode[_grid(rows, cols, group, shape["COUNT"])](
            x, codes.view(torch.uint8), scales.view(torch.int16), flags, rows, cols, -(-cols // group), **shape,
            FORM=Form.of(curve), **OPTIONS,
        )  # fmt: skip
        return flags_of(x, signed=curve.signed) if flags_on_host(flags) else 0


def flags_of(x: Tensor, *, signed: bool) -> int:
    """The flags of a tensor that is known to hold a value that is refused."""
    flags = kernels.NAN * bool(x.isnan().any()) | kernels.INF * bool(x.isinf().any())
    return flags if signed else flags | kernels.NEGATIVE * bool((x < 0).any())


def decode_companded(codes: Tensor, scales: Tensor, out: Tensor, *, curve: Curve, group: int) -> None:
    """See `reference.companding.decode_companded`."""
    rows, cols = out.shape
    with on(out):
        if not rows or not cols:
            return
        shape = _shape(rows, cols, group, curve.bits)
        _decode[_grid(rows, cols, group, shape["COUNT"])](
            codes.view(torch.uint8), scales.view(torch.int16), decode_table(curve, out.device), out,
            rows, cols, -(-cols // group), **shape, NIBBLES=curve.bits == 4, **OPTIONS,
        )  # fmt: skip


def _shape(rows: int, cols: int, group: int, bits: int) -> dict[str, int | bool]:
    """The tile for this shape. A group wider than its row is the row."""
    size = min(group, cols + cols % 2)
    width = min(max(power_of_two(size), 2), WIDEST)
    count = max(1, min(TILE // width, power_of_two(rows * -(-cols // group))))
    # The tables of nibbles run to whole bytes at each row's end, so flat addressing needs even rows.
    even = cols % group == 0 and (bits == 8 or cols % 2 == 0)
    chunks = -(-size // width)
    return {
        "GROUP": group, "COUNT": count, "WIDTH": width, "CHUNKS": chunks, "EVEN": even,
        "WHOLE": even and group == width * chunks,
    }  # fmt: skip


def _grid(rows: int, cols: int, group: int, count: int | bool) -> tuple[int]:
    return (-(-rows * -(-cols // group) // count),)
