"""The fast step's building blocks: four values in a word, and exact results from approximate instructions.

Four bf16 numbers lie in an int64, four codes or low parts in an int32. Byte permutations unpack them into four planes
and pack them again; conversion instructions run at a quarter of that rate. A code c in the low byte of 2**23's bits is
the number 2**23 + c, so a subtraction finishes the conversion.

Division and square root start from the hardware's approximations (within 1 ulp, subnormals flushed to zero) and add a
correction step that makes the result correctly rounded for the operands that occur; each function says for which.
Triton's interpreter knows no inline assembly: tests bring an interpreter of PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)
_PLANES = tl.constexpr((tl.float32, tl.float32, tl.float32, tl.float32))


@triton.jit
def bits(x):
    """The bits of fp32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def value(x):
    """The fp32 with these bits."""
    return x.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|: they order like the magnitudes, with infinity and NaN on top."""
    return bits(x) & 0x7FFFFFFF


@triton.jit
def unsigned_bits(x):
    """Bits of fp32 `x` as uint32: from those of infinity on they are what is not a number from 0 on (-0.0 is one)."""
    return (x + 0.0).to(tl.uint32, bitcast=True)


@triton.jit
def nearest_bf16(bits):
    """The bits of the bf16 that is nearest to an fp32 number, or the even one of two, from its bits."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _assembly(x, TEXT: tl.constexpr, SOURCE: tl.constexpr):
    """One instruction from one operand, of the register kind SOURCE, to fp32."""
    return tl.inline_asm_elementwise(TEXT, "=f," + SOURCE, [x], dtype=tl.float32, is_pure=True, pack=1)


# --- arithmetic


@triton.jit
def negated(x):
    """-x as a sign change; Triton's own is 0 - x, an addition that the compiler must keep."""
    return _assembly(x, "neg.f32 $0, $1;", "f")


@triton.jit
def reciprocal(x):
    """1 / x within 1 ulp; results below 2**-126 are 0."""
    return _assembly(x, "rcp.approx.ftz.f32 $0, $1;", "f")


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x) within 1 ulp."""
    return _assembly(x, "rsqrt.approx.ftz.f32 $0, $1;", "f")


@triton.jit
def rounded_reciprocal(x):
    """1 / x within an ulp, correctly rounded for bf16 numbers from 2**-126 to 2**125."""
    y = reciprocal(x)
    return tl.fma(tl.fma(negated(x), y, 1.0), y, y)


@triton.jit
def quotient(x, d, y):
    """x / d from y, the reciprocal of d: one remainder step, which rounds correctly if y is rounded correctly."""
    q = x * y
    return tl.fma(tl.fma(negated(q), d, x), y, q)


@triton.jit
def root(x):
    """sqrt(x), correctly rounded for 0 and for x from 2**-93 on."""
    y = reciprocal_root(x + 1.1754943508222875e-38)  # 2**-126: keeps 0 from becoming infinite times 0
    s = x * y
    return tl.fma(tl.fma(negated(s), s, x), 0.5 * y, s)


@triton.jit
def is_positive(x):
    """1.0 for x >= 2**-120, 0.0 for x = 0: a saturating product, not a comparison."""
    return _assembly(x, "mul.sat.f32 $0, $1, 0f7B800000;", "f")


@triton.jit
def floor_in_byte_one(x, y):
    """A word whose byte 1 is floor(x * y + 0.5), for results from 0 to 255."""
    return tl.inline_asm_elementwise(
        "fma.rz.f32 $0, $1, $2, 0f47000080;", "=r,f,f", [x, y], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def larger(a, b):
    """The larger of two; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def looked_up(table_ptr, index):
    """The fp32 numbers of a small table at these indices, in the layout that the indices have.

    A load of Triton's own would choose a layout and convert to it. The table must not be written meanwhile.
    """
    return _assembly(table_ptr.to(tl.int64) + index.to(tl.int64) * 4, "ld.global.nc.f32 $0, [$1];", "l")


# --- unpacking and packing


@triton.jit
def codes(word, SIGNED: tl.constexpr):
    """int32 of four int8 codes, or of four uint8 codes -> four fp32."""
    if SIGNED:  # moved up, to be unsigned
        word = word ^ -0x7F7F7F80
    a, b, c, d = tl.inline_asm_elementwise(
        "{prmt.b32 $0, $4, 0x4B000000, 0x7440; prmt.b32 $1, $4, 0x4B000000, 0x7441;"
        " prmt.b32 $2, $4, 0x4B000000, 0x7442; prmt.b32 $3, $4, 0x4B000000, 0x7443;}",
        "=f,=f,=f,=f,r", [word], dtype=_PLANES, is_pure=True, pack=1,
    )  # fmt: skip
    zero = 2.0**23 + (128.0 if SIGNED else 0.0)
    return a - zero, b - zero, c - zero, d - zero


@triton.jit
def bf16_values(word):
    """int64 of four bf16 -> four fp32."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 a, c; mov.b64 {a, c}, $4; shl.b32 $0, a, 16; and.b32 $1, a, 0xFFFF0000; shl.b32 $2, c, 16;"
        " and.b32 $3, c, 0xFFFF0000;}",
        "=f,=f,=f,=f,l", [word], dtype=_PLANES, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def joined(high, low):
    """(int64 of four bf16, int32 of four int8 low parts) -> four fp32: bits = (high << 16) + (low << 8)."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 t, a, c, p, q, r, s, h, i; mov.b64 {h, i}, $4; xor.b32 t, $5, 0x80808080;"
        " prmt.b32 a, t, 0, 0x1404; prmt.b32 c, t, 0, 0x3424;"
        " prmt.b32 p, h, a, 0x1054; prmt.b32 q, h, a, 0x3276; prmt.b32 r, i, c, 0x1054; prmt.b32 s, i, c, 0x3276;"
        " add.s32 $0, p, 0xFFFF8000; add.s32 $1, q, 0xFFFF8000; add.s32 $2, r, 0xFFFF8000;"
        " add.s32 $3, s, 0xFFFF8000;}",
        "=f,=f,=f,=f,l,r", [high, low], dtype=_PLANES, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def divided(a, b, c, d):
    """The inverse of `joined`: four fp32 to 24 bits each, half away from zero, in (high, low)."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 a, c, d, e, p, q; add.s32 a, $2, 0x80; add.s32 c, $3, 0x80; add.s32 d, $4, 0x80;"
        " add.s32 e, $5, 0x80; prmt.b32 p, a, c, 0x0051; prmt.b32 q, d, e, 0x0051; prmt.b32 $1, p, q, 0x5410;"
        " add.s32 a, a, 0x8000; add.s32 c, c, 0x8000; add.s32 d, d, 0x8000; add.s32 e, e, 0x8000;"
        " prmt.b32 p, a, c, 0x7632; prmt.b32 q, d, e, 0x7632; mov.b64 $0, {p, q};}",
        "=l,=r,r,r,r,r", [a, b, c, d], dtype=(tl.int64, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def packed_bytes(a, b, c, d, BYTE: tl.constexpr):
    """Byte BYTE (0 or 1) of four words as one word."""
    PAIR: tl.constexpr = "0x0051" if BYTE else "0x0040"
    TEXT: tl.constexpr = (
        "{.reg .b32 p, q; prmt.b32 p, $1, $2, " + PAIR + "; prmt.b32 q, $3, $4, " + PAIR + ";"
        " prmt.b32 $0, p, q, 0x5410;}"
    )  # fmt: skip
    return tl.inline_asm_elementwise(TEXT, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
