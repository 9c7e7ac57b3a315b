"""Reading untrusted JSON: bounded before parsing, no duplicate keys, every field's type and range stated."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

from statecodec.errors import FormatError
from statecodec.limits import MAX_DIMS, Limits

# The closing quote is optional so that a match never fails: on hostile input a failing pattern would go quadratic.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_REQUIRED = object()


def parse_json(data: bytes, label: str, limits: Limits) -> Any:
    """Parse untrusted JSON. Raises FormatError, or LimitExceeded.

    Duplicate keys, NaN and infinities are refused; texts that are too large or too deep before they are parsed.
    """
    bare = _STRING.sub(b"", data)
    brackets = np.frombuffer(bare.translate(None, _NOT_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    limits.check(f"{label}: number of JSON values", bare.count(b",") + int(opening.sum()), limits.max_json_values)
    if brackets.size:
        depth = int(np.where(opening, np.int32(1), np.int32(-1)).cumsum(dtype=np.int32).max())
        limits.check(f"{label}: JSON depth", depth, limits.max_json_depth)
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label} is not valid JSON: {error}") from error


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. Raises ValueError or TypeError for what it cannot hold (NaN, infinities, lone surrogates)."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return unique


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word[:40]} is out of range")
    return value


class Fields:
    """The fields of one untrusted JSON object. Errors name it as `where`."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: expected an object, found {type(value).__name__}")
        self.values, self.where, self.taken = value, where, set[str]()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """A field of an exact type (a bool is not an int). Raises FormatError."""
        self.taken.add(key)
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise FormatError(f"{self.where}: field {key!r} is missing")
        if key in self.values and type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise FormatError(f"{self.where}: field {key!r} has the wrong type {type(value).__name__}")
        return value

    def integer(self, key: str, high: int, low: int = 0) -> int:
        """An integer field from 0 to `high`. Raises FormatError."""
        value = self.take(key, int)
        if not low <= value <= high:
            raise FormatError(f"{self.where}: {key}={str(value)[:40]}, expected {low} to {high}")
        return int(value)

    def hexadecimal(self, key: str, digits: int) -> str:
        """A field with a hexadecimal number, as `hexadecimal` takes it. Raises FormatError."""
        return hexadecimal(self.take(key, str), digits, f"{self.where}: {key}")

    def shape(self, key: str = "shape") -> tuple[int, ...]:
        """A field with dimensions, as `shape` takes them. Raises FormatError."""
        return shape(self.take(key, list), self.where)

    def done(self, newer: bool) -> None:
        """Refuse unknown fields, unless the file is of a newer minor version, which may have more.

        Raises FormatError.
        """
        unknown = self.values.keys() - self.taken
        if unknown and not newer:
            raise FormatError(f"{self.where}: unknown field {min(unknown)[:80]!r}")


def hexadecimal(value: Any, digits: int, where: str) -> str:
    """A lower-case hexadecimal number of exactly that many digits."""
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
        raise FormatError(f"{where}: expected {digits} lower-case hexadecimal digits, found {str(value)[:40]!r}")
    return value


def shape(value: list[Any], where: str) -> tuple[int, ...]:
    """Dimensions: at most 64, each 0 to 2**62, and their product (zeros left out) at most 2**62 too."""
    if len(value) > MAX_DIMS or any(type(d) is not int or not 0 <= d <= 1 << 62 for d in value):
        raise FormatError(f"{where}: not a shape: {str(value)[:80]}")
    if math.prod(d for d in value if d) > 1 << 62:
        raise FormatError(f"{where}: shape {str(value)[:80]} is not possible")
    return tuple(value)
