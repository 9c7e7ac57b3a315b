"""An interpreter of PTX, as far as these kernels use it: one block at a time, all its threads in step.

A register is a numpy array with one entry a thread, held as unsigned bits of its width (predicates: bool). Global
addresses are those of this process, so a kernel works on the very tensors that a launch was given. What is not
understood raises NotImplementedError, and branches that threads take differently raise AssertionError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TYPES = {
    **{f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
       for letter, kind in (("u", "u"), ("b", "u"), ("s", "i")) for bits in (8, 16, 32, 64)},
    "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?"),
}  # fmt: skip
TINY = np.float32(2.0**-126)
BASE = 4096  # where the view of memory begins: not at address 0, which numpy takes for none


class _Everything:
    __array_interface__: ClassVar = {
        "shape": ((1 << 47) - BASE,), "typestr": "|u1", "data": (BASE, False), "version": 3,
    }  # fmt: skip


def memory() -> Array:
    """All memory of this process, as bytes from BASE on; touching what is not there ends the process."""
    return np.asarray(_Everything())


def names(operand: str) -> list[str]:
    """The registers in braces."""
    return re.findall(r"[%\w]+", operand)


# --- floating point that numpy does not have


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp32 in fp64, rounded to odd: rounding that to fp32 again, in any direction, rounds once."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)  # exact
    total = product + c
    of_c = total - product
    rest = (product - (total - of_c)) + (c - of_c)
    bits = total.view(np.int64)
    odd = bits + np.where((rest > 0) == (total > 0), 1, -1)
    return np.where(np.isfinite(total) & (rest != 0) & (bits & 1 == 0), odd, bits).view(np.float64)


def toward_zero(x: Array) -> Array:
    """fp64 to fp32."""
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def flushed(x: Array) -> Array:
    """Subnormal fp32 numbers become zeros."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def to_integer(x: Array, dtype: np.dtype[Any]) -> Array:
    """Toward zero, clipped to the type's range; NaN is 0."""
    limits = np.iinfo(dtype)
    whole = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    return whole.clip(limits.min, limits.max).astype(dtype)


def permuted(a: Array, b: Array, selector: int | Array) -> Array:
    """prmt.b32, whose selector is the same in all threads (an int) or not."""
    pool = [x >> np.uint32(8 * i) & np.uint32(0xFF) for x in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        choice = selector >> 4 * i & 0xF
        byte = pool[choice & 7] if isinstance(choice, int) else np.choose(choice & 7, pool)
        if np.any(choice & 8):
            byte = np.where(choice & 8, np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
        result |= byte << np.uint32(8 * i)
    return result


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
SIMPLE: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "mov": np.copy, "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt,
    "copysign": lambda sign, x: np.copysign(x, sign), "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
}  # fmt: skip


class Machine:
    """One kernel's PTX; `run` executes one block of it.

    Args:
        ptx: as Triton makes it, with one entry.
        shared: bytes of shared memory.
        off: approximations (rcp, rsqrt) are the correctly rounded results, moved by up to this many ulp at random.
    """

    def __init__(self, ptx: str, shared: int, off: int = 1) -> None:
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
        self.off, self.random = off, np.random.default_rng(0)
        self.memory, self.shared = memory(), np.zeros(shared + 16, np.uint8)
        self.code, self.labels = list[tuple[str, str, list[str]]](), dict[str, int]()
        body = re.sub(r"//.*|\.loc[^\n]*", "", ptx[ptx.index(".reqntid") :])
        body = body[body.index("{") + 1 : body.index("\n}")]
        for statement in re.split(r"[;\n]", re.sub(r"(\$\w+):", r"\1:;", body)):
            self._add(re.sub(r"^[{}\s]*(?=[.a-z@$]|$)", "", statement.strip()))

    @classmethod
    def of_assembly(cls, text: str) -> Machine:
        """A machine for some inline assembly, whose operands $0, $1, ... are its registers."""
        return cls(".reqntid 1\n{" + re.sub(r"\$(\d+)", r"%operand\1", text) + ";ret\n}", 0)

    def assembly(self, inputs: Sequence[Array], outputs: Sequence[np.dtype[Any]]) -> list[Array]:
        """What the operands that come first are afterwards, given those that follow; one thread an element."""
        self.threads = inputs[0].size
        given = {f"%operand{len(outputs) + i}": x.view(f"u{x.itemsize}") for i, x in enumerate(inputs)}
        self.run(0, (), given)
        return [self.registers[f"%operand{i}"].view(dtype) for i, dtype in enumerate(outputs)]

    def _add(self, statement: str) -> None:
        """One statement of the body, after the braces of an inline assembly's scope."""
        if label := re.fullmatch(r"(\$\w+):", statement):
            self.labels[label[1]] = len(self.code)
        elif statement and not statement.startswith((".reg", ".pragma", "}")):
            found = re.match(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
            assert found, statement
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", found[3])
            self.code.append((found[1] or "", found[2], operands))

    def run(self, block: int, params: Sequence[int], registers: Mapping[str, Array] | None = None) -> None:
        """Execute one block of the kernel; `params` are its arguments, integers and addresses."""
        self.block, self.params, self.registers = block, params, dict(registers or {})
        at = 0
        with np.errstate(all="ignore"):
            while True:
                guard, op, operands = self.code[at]
                at += 1
                mask = None
                if guard:
                    mask = self.registers[guard.lstrip("!")]
                    mask = ~mask if guard[0] == "!" else mask
                kind, *rest = op.split(".")
                if kind == "ret":
                    return
                if kind == "bra":
                    assert mask is None or mask.all() or not mask.any(), "threads take different branches"
                    at = self.labels[operands[0]] if mask is None or mask.all() else at
                elif kind != "bar":
                    self._execute(kind, rest, operands, mask)

    # --- operands

    def get(self, operand: str, kind: str) -> Array:
        """An operand's value as this type; of a wider register, the low bits."""
        dtype = TYPES[kind]
        if operand.startswith(("0f", "0d")):
            return np.full(self.threads, int(operand[2:], 16), f"u{dtype.itemsize}").view(dtype)
        if re.fullmatch(r"-?(?:0x[0-9A-Fa-f]+|\d+)", operand):
            bits = int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
            return np.full(self.threads, bits & 1 if kind == "pred" else bits, f"u{dtype.itemsize}").view(dtype)
        special = {"%tid.x": np.arange(self.threads), "%ctaid.x": self.block, "global_smem": 0}
        if operand in special:
            return np.full(self.threads, special[operand], f"u{dtype.itemsize}").view(dtype)
        value = self.registers[operand]
        return value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(f"u{dtype.itemsize}").view(dtype)

    def put(self, register: str, value: Array, mask: Array | None) -> None:
        """Set a register, where the mask says so; bytes are held in 16 bits."""
        if value.dtype != np.bool_:
            value = (
                value.astype(f"{value.dtype.kind}2") if value.itemsize == 1 else value
            )  # with its sign, if it has one
            value = np.ascontiguousarray(value).view(f"u{value.itemsize}")
        if mask is not None:
            value = np.where(mask, value, self.registers.get(register, np.zeros_like(value)))
        self.registers[register] = value

    def _place(self, operand: str, space: str, size: int) -> tuple[Array, Array]:
        """(memory as numbers of this size, which of them) that an operand in brackets means."""
        register, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand).groups()  # type: ignore[union-attr]
        at = self.get(register, "s64" if space == "global" else "s32").astype(np.int64) + int(offset or 0)
        held = self.memory if space == "global" else self.shared[: len(self.shared) // 8 * 8]
        at = at - BASE if space == "global" else at
        assert (at % size == 0).all(), "an access is not aligned"
        return held[: len(held) // 8 * 8].view(f"u{size}"), at // size

    # --- instructions

    def _execute(self, kind: str, rest: list[str], o: list[str], mask: Array | None) -> None:
        last = rest[-1]
        if kind in ("ld", "st"):
            self._access(kind, rest, o, mask)
        elif kind in ("red", "atom"):
            self._add_to_memory(rest, o, mask)
        elif kind in ("ldmatrix", "stmatrix"):
            self._access_matrices(kind, rest, o)
        elif kind == "mov" and "{" in o[0] + o[1]:
            self._split_or_join(o, last, mask)
        else:
            self.put(o[0], self._value(kind, rest, o[1:]), mask)

    def _access(self, kind: str, rest: list[str], o: list[str], mask: Array | None) -> None:
        if rest[0] == "param":
            number = int(re.search(r"_param_(\d+)", o[1])[1])  # type: ignore[index]
            self.put(o[0], np.full(self.threads, self.params[number], np.int64), mask)
            return
        size = TYPES[rest[-1]].itemsize
        held, at = self._place(o[kind == "ld"], rest[0], size)
        chosen = slice(None) if mask is None else mask
        for i, register in enumerate(names(o[kind == "st"])):
            if kind == "ld":
                value = np.zeros(self.threads, f"u{size}")
                value[chosen] = held[at[chosen] + i]
                self.put(register, value, mask)
            else:
                held[at[chosen] + i] = self.get(register, f"b{8 * size}")[chosen]

    def _add_to_memory(self, rest: list[str], o: list[str], mask: Array | None) -> None:
        """Thread after thread; an `atom` has a first operand, for what was there before."""
        assert rest[-2] == "add"
        *before, place, value = o
        held, at = self._place(place, "global", 4)
        held, added = held.view(TYPES[rest[-1]]), self.get(value, rest[-1])
        found = np.zeros_like(added)
        for thread in np.flatnonzero(np.ones(self.threads, bool) if mask is None else mask):
            found[thread] = held[at[thread]]
            held[at[thread]] += added[thread]
        for register in before:
            self.put(register, found, mask)

    def _access_matrices(self, kind: str, rest: list[str], o: list[str]) -> None:
        """8 x 8 numbers of 16 bits, by warp and register: lane l has the address of row l, two numbers of row l / 4."""
        assert "trans" not in rest
        held, rows = self._place(o[kind == "ldmatrix"], "shared", 4)
        thread = np.arange(self.threads)
        for i, register in enumerate(names(o[kind == "stmatrix"])):
            at = rows[thread // 32 * 32 + 8 * i + thread % 32 // 4] + thread % 4
            if kind == "ldmatrix":
                self.put(register, held[at], None)
            else:
                held[at] = self.get(register, "b32")

    def _split_or_join(self, o: list[str], kind: str, mask: Array | None) -> None:
        half = int(kind[1:]) // 2
        low, high = names(o[0] if "{" in o[0] else o[1])
        whole = TYPES[f"b{2 * half}"]
        if "{" in o[0]:
            value = self.get(o[1], f"b{2 * half}")
            self.put(low, value.astype(TYPES[f"b{half}"]), mask)
            self.put(high, (value >> whole.type(half)).astype(TYPES[f"b{half}"]), mask)
        else:
            # A half that is not looked at later may be a register that was never set.
            unset = np.full(self.threads, -1, TYPES[f"s{half}"]).view(TYPES[f"b{half}"])
            parts = [(self.get(x, f"b{half}") if x in self.registers else unset).astype(whole) for x in (low, high)]
            self.put(o[0], parts[0] | parts[1] << whole.type(half), mask)

    def _value(self, kind: str, rest: list[str], o: list[str]) -> Array:
        last = rest[-1]
        if kind == "cvt" and last == "bf16":
            return (self.get(o[0], "b16").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if kind == "cvt":
            x, to = self.get(o[0], last), TYPES[rest[-2]]
            return to_integer(x, to) if x.dtype.kind == "f" and to.kind != "f" else x.astype(to)
        if kind == "setp":
            x, y = self.get(o[0], last), self.get(o[1], last)
            nan = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(self.threads, bool)
            return COMPARE[rest[0][:2]](x, y) & ~nan | (nan if rest[0].endswith("u") else False)
        if kind == "selp":
            return np.where(self.registers[o[2]], self.get(o[0], last), self.get(o[1], last))
        if kind in ("shl", "shr", "bfe"):
            return self._shifted(kind, last, o)
        if kind == "shfl":
            assert [*rest[:2], o[2]] == ["sync", "bfly", "31"]
            return self.get(o[0], last)[np.arange(self.threads) ^ int(o[1])]
        if kind == "redux":
            reduce = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}[rest[1]].reduce
            return reduce(self.get(o[0], last).reshape(-1, 32), 1, dtype=TYPES[last]).repeat(32)
        if kind == "prmt":
            selector = self.get(o[2], "s32") if o[2][0] == "%" else int(o[2].rstrip("U"), 0)
            return permuted(self.get(o[0], "b32"), self.get(o[1], "b32"), selector)
        if kind in ("mul", "mad") and last[0] != "f":
            wide = TYPES[f"{last[0]}{2 * int(last[1:])}"] if rest[0] == "wide" else TYPES[last]
            product = self.get(o[0], last).astype(wide) * self.get(o[1], last).astype(wide)
            return product if kind == "mul" else product + self.get(o[2], f"{last[0]}{8 * wide.itemsize}")
        return self._arithmetic(kind, rest, [self.get(x, last) for x in o])

    def _shifted(self, kind: str, last: str, o: list[str]) -> Array:
        """Shifts by more than a type's width leave nothing, or the sign."""
        x, by = self.get(o[0], last), self.get(o[1], "u32")
        bits = 8 * x.itemsize
        if kind == "bfe":  # the field, widened with its own sign
            above = x.dtype.type(bits - int(o[2]))
            return x << (above - by.astype(x.dtype)) >> above
        if kind == "shr" and last[0] == "s":
            return x >> np.minimum(by, bits - 1).astype(x.dtype)
        moved = (np.left_shift if kind == "shl" else np.right_shift)(x, np.minimum(by, bits - 1).astype(x.dtype))
        return np.where(by < bits, moved, x.dtype.type(0))

    def _arithmetic(self, kind: str, rest: list[str], x: list[Array]) -> Array:
        assert ("ftz" in rest) == ("approx" in rest), "subnormals are flushed"
        if kind == "fma":
            exact = fused(*x)
            return toward_zero(exact) if rest[0] == "rz" else exact.astype(np.float32)
        if kind == "mul":
            product = x[0] * x[1]
            return np.nan_to_num(product, nan=0.0).clip(0, 1) if "sat" in rest else product
        if kind in ("max", "min"):
            plain, numbers = (np.maximum, np.fmax) if kind == "max" else (np.minimum, np.fmin)
            return plain(*x) if x[0].dtype.kind != "f" or "NaN" in rest else numbers(*x)
        if kind in ("rcp", "rsqrt"):
            base = flushed(x[0]).astype(np.float64)
            return self._approximate(1 / (base if kind == "rcp" else np.sqrt(base)))
        if kind in ("div", "rem") and x[0].dtype.kind != "f":  # as in C, toward zero
            left = np.fmod(x[0], x[1])
            return left if kind == "rem" else (x[0] - left) // x[1]
        if kind == "div" and rest[0] == "rn":
            return x[0] / x[1]
        if kind in SIMPLE:
            return SIMPLE[kind](*x)
        raise NotImplementedError(f"{kind}.{'.'.join(rest)}")

    def _approximate(self, exact: Array) -> Array:
        """A result of the special function unit: near, flushed."""
        near = exact.astype(np.float32)
        by = self.random.integers(-self.off, self.off + 1, near.shape, dtype=np.int32)
        by[~np.isfinite(near) | (near == 0)] = 0
        return flushed((near.view(np.int32) + by).view(np.float32))
