"""What each pickle opcode (protocols 0-5) does to the machine. Meanings: CPython's Lib/pickletools.py."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any, Final

from statecodec.dtypes import UINT8, storage_dtype
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.machine import Machine
from statecodec.layouts.pickle.nodes import DictNode, Global, Opaque, SetNode, StorageNode
from statecodec.layouts.pickle.rebuild import build, call

_MAX_INT_BYTES: Final = 1 << 16
_INT32: Final = struct.Struct("<i").unpack_from
_UINT16: Final = struct.Struct("<H").unpack_from
_UINT32: Final = struct.Struct("<I").unpack_from
_UINT64: Final = struct.Struct("<Q").unpack_from
_FLOAT64: Final = struct.Struct(">d").unpack_from

STOP: Final = ord(".")


# ---- constants, numbers, strings


def _constant(value: Any) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value)


def _fixed(unpack: Callable[[bytes, int], tuple[Any, ...]], size: int) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        m.stack.append(unpack(m.data, m.pos)[0])
        m.pos += size

    return op


def _binint1(m: Machine) -> None:
    m.stack.append(m.data[m.pos])
    m.pos += 1


def _int(m: Machine) -> None:
    text = m.line()
    m.stack.append(text == b"01" if text in (b"00", b"01") else _number(text))


def _long(m: Machine) -> None:
    m.stack.append(_number(m.line().rstrip(b"L")))


def _number(text: bytes) -> int:
    """A number as CPython reads it: up to a NUL, in any base that a prefix names."""
    digits = text.partition(b"\0")[0]
    return int(digits, 0) if digits.strip().lstrip(b"+-")[1:2].isalpha() else int(digits)


def _float(m: Machine) -> None:
    m.stack.append(float(m.line()))


def _long_bytes(m: Machine, n: int) -> None:
    if not 0 <= n <= _MAX_INT_BYTES:
        raise m.not_followed(f"holds an integer of {n} bytes; more than {_MAX_INT_BYTES} are not read")
    m.stack.append(int.from_bytes(m.take(n), "little", signed=True))


def _sized(size: int, then: Callable[[Machine, int], None]) -> Callable[[Machine], None]:
    """An opcode whose argument is a `size`-byte count followed by that many bytes."""

    def op(m: Machine) -> None:
        then(m, int.from_bytes(m.take(size), "little"))

    return op


def _text(m: Machine, n: int) -> None:
    m.stack.append(str(m.take(n), "utf-8", "surrogatepass"))


def _raw(m: Machine, n: int) -> None:
    m.push(m.take(n))


def _raw_array(m: Machine, n: int) -> None:
    m.push(bytearray(m.take(n)))


def _python2_text(m: Machine, n: int) -> None:
    found = m.take(n)
    try:
        m.stack.append(found.decode("utf-8"))
    except UnicodeDecodeError:  # Python 2 bytes: they have no encoding
        m.stack.append(found)


def _quoted(m: Machine) -> None:
    text = m.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"\"'":
        raise MalformedCheckpoint("holds a string without its quotes")
    decoded: bytes = codecs.escape_decode(text[1:-1])[0]
    m.stack.append(decoded.decode("latin-1"))


def _unicode(m: Machine) -> None:
    m.stack.append(str(m.line(), "raw-unicode-escape"))


# ---- containers


def _mark(m: Machine) -> None:
    m.marks.append(len(m.stack))
    m.made += 1


def _tuple(m: Machine) -> None:
    m.push(tuple(m.since_mark()))


def _tuple_n(n: int) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        stack = m.stack
        if len(stack) < n:
            raise MalformedCheckpoint("takes more objects than there are")
        stack[-n:] = [tuple(stack[-n:])]
        m.made += 1

    return op


def _pairs(found: list[Any]) -> list[tuple[Any, Any]]:
    if len(found) % 2:
        raise MalformedCheckpoint("sets a key without a value")
    return list(zip(found[::2], found[1::2], strict=True))


def _set_pairs(m: Machine, pairs: list[tuple[Any, Any]]) -> None:
    target = m.stack[-1]
    if not pairs:  # of whatever it is
        return
    if type(target) in (list, bytearray):
        raise m.not_followed(f"sets elements of a {type(target).__name__}")
    if type(target) is not DictNode and type(target) is not Opaque:
        raise MalformedCheckpoint(f"sets keys of a {type(target).__name__}")
    target.items.extend(pairs)


def _extend(m: Machine, found: list[Any]) -> None:
    target = m.stack[-1]
    if not found:  # to whatever it is
        return
    if type(target) is list:
        target.extend(found)
    elif type(target) is Opaque:
        target.elements.extend(found)
    elif type(target) is bytearray:
        raise m.not_followed("appends to a bytearray")
    else:
        raise MalformedCheckpoint(f"appends to a {type(target).__name__}")


def _setitem(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set_pairs(m, [(key, value)])


def _dict(m: Machine) -> None:
    node = DictNode()
    node.items = _pairs(m.since_mark())
    m.push(node)


def _additems(m: Machine) -> None:
    found, target = m.since_mark(), m.stack[-1]
    if type(target) is SetNode:
        target.items.extend(found)
    else:
        _extend(m, found)


# ---- memo and stack


def _binget(m: Machine) -> None:
    m.stack.append(m.memo[m.data[m.pos]])
    m.pos += 1


def _binput(m: Machine) -> None:
    m.remember(m.data[m.pos])
    m.pos += 1


def _long_binget(m: Machine) -> None:
    m.stack.append(m.memo[_UINT32(m.data, m.pos)[0]])
    m.pos += 4


def _long_binput(m: Machine) -> None:
    m.remember(_UINT32(m.data, m.pos)[0])
    m.pos += 4


def _get(m: Machine) -> None:
    m.stack.append(m.memo[int(m.line())])


def _put(m: Machine) -> None:
    if not m.stack:
        raise MalformedCheckpoint("remembers what is not there")
    m.remember(int(m.line()))


def _pop(m: Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


def _frame(m: Machine) -> None:
    length = _UINT64(m.data, m.pos)[0]
    m.pos += 8
    if m.pos + length > len(m.data):
        raise m.cut_off(f"claims a frame of {length} bytes where {len(m.data) - m.pos} are left")


def _protocol(m: Machine) -> None:
    m.protocol = m.take(1)[0]
    if m.protocol > 5:
        raise MalformedCheckpoint(f"pickle protocol {m.protocol}; 0 to 5 are known")


# ---- objects


def _global(m: Machine) -> None:
    module = m.line().decode()
    m.stack.append(m.named(module, m.line().decode()))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.named(module, name))


def _call(m: Machine, func: Any, args: Any, kwargs: DictNode | None = None) -> None:
    m.called = True
    m.push(call(func, args, kwargs))


def _reduce(m: Machine) -> None:
    args, func = m.stack.pop(), m.stack.pop()
    _call(m, func, args)


def _newobj_ex(m: Machine) -> None:
    kwargs, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if type(kwargs) is not DictNode:
        raise MalformedCheckpoint("makes an object with keyword arguments that are no dict")
    _call(m, cls, args, kwargs)


def _build(m: Machine) -> None:
    state = m.stack.pop()
    build(m.stack[-1], state)


def _inst(m: Machine) -> None:
    module = m.line().decode()
    cls = m.named(module, m.line().decode())
    _call(m, cls, tuple(m.since_mark()))


def _obj(m: Machine) -> None:
    found = m.since_mark()
    _call(m, found[0], tuple(found[1:]))


def _persistent(m: Machine) -> None:
    pid = m.stack.pop()
    if type(pid) is not tuple:
        raise MalformedCheckpoint("refers to something outside of the pickle by what torch never does")
    if len(pid) < 5 or pid[0] != "storage":
        raise m.not_followed("refers to something outside of the pickle that is no torch storage")
    _, cls, key, location, numel = pid[:5]
    kind = storage_dtype(cls.module, cls.name) if type(cls) is Global else None
    spelled_right = type(key) is str and type(location) is str and type(numel) is int
    if kind is None or not spelled_right or not 0 <= numel < 1 << 63:
        raise m.not_followed(f"refers to a storage that cannot be understood (class {cls!r:.80})")
    dtype, untyped = kind
    known = m.storages.get(key)
    if known is None or known.dtype is not (dtype or UINT8) or known.numel != (numel if dtype else None):
        if dtype is None:
            known = StorageNode(key, UINT8, location, None, untyped=True)
        else:
            known = StorageNode(key, dtype, location, numel, untyped)
        m.storages.setdefault(key, known)
    m.push(known)


def _refused(what: str) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        raise MalformedCheckpoint(what)

    return op


_OPCODES: Final[dict[bytes, Callable[[Machine], None]]] = {
    b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False), b")": lambda m: m.push(()),
    b"K": _binint1, b"M": _fixed(_UINT16, 2), b"J": _fixed(_INT32, 4), b"G": _fixed(_FLOAT64, 8),
    b"I": _int, b"L": _long, b"F": _float, b"\x8a": _sized(1, _long_bytes), b"\x8b": _sized(4, _long_bytes),
    b"\x8c": _sized(1, _text), b"X": _sized(4, _text), b"\x8d": _sized(8, _text),
    b"C": _sized(1, _raw), b"B": _sized(4, _raw), b"\x8e": _sized(8, _raw), b"\x96": _sized(8, _raw_array),
    b"U": _sized(1, _python2_text), b"T": _sized(4, _python2_text), b"S": _quoted, b"V": _unicode,
    b"(": _mark, b"t": _tuple, b"\x85": _tuple_n(1), b"\x86": _tuple_n(2), b"\x87": _tuple_n(3),
    b"]": lambda m: m.push([]), b"}": lambda m: m.push(DictNode()),
    b"\x8f": lambda m: m.push(SetNode([], frozen=False)),
    b"l": lambda m: m.push(m.since_mark()), b"d": _dict,
    b"\x91": lambda m: m.push(SetNode(m.since_mark(), frozen=True)),
    b"a": lambda m: _extend(m, [m.stack.pop()]), b"e": lambda m: _extend(m, m.since_mark()), b"\x90": _additems,
    b"s": _setitem, b"u": lambda m: _set_pairs(m, _pairs(m.since_mark())),
    b"h": _binget, b"j": _long_binget, b"g": _get, b"q": _binput, b"r": _long_binput,
    b"p": _put, b"\x94": lambda m: m.remember(len(m.memo)),
    b"0": _pop, b"1": lambda m: m.since_mark().clear(), b"2": lambda m: m.stack.append(m.stack[-1]),
    b"c": _global, b"\x93": _stack_global, b"R": _reduce, b"\x81": _reduce, b"\x92": _newobj_ex, b"b": _build,
    b"i": _inst, b"o": _obj, b"Q": _persistent, b"\x80": _protocol, b"\x95": _frame,
    b"P": _refused("refers to a persistent object by text, which torch never does"),
    b"\x82": _refused("uses the extension registry, which torch never does"),
    b"\x83": _refused("uses the extension registry, which torch never does"),
    b"\x84": _refused("uses the extension registry, which torch never does"),
    b"\x97": _refused("keeps buffers out of band, which torch never does"),
    b"\x98": _refused("keeps buffers out of band, which torch never does"),
}  # fmt: skip
TABLE: Final = [_OPCODES.get(bytes([op]), _refused(f"{op:#04x} is no pickle opcode")) for op in range(256)]
