"""Numbers of an untrusted document: columns of differences, and values held to a range."""

from __future__ import annotations

from typing import Any

from statecodec.errors import FormatError
from statecodec.strict import Fields

MAX_FILE = 1 << 50  # bytes


def differences(values: Any) -> list[int]:
    """Each value less the one before it: of numbers that rise evenly, the same number again and again."""
    found, last = [], 0
    for value in values:
        found.append(value - last)
        last = value
    return found


def summed(fields: Fields, key: str, low: int, high: int, what: str) -> list[int]:
    """The values that a column of differences stands for, each in its range."""
    found, value = [], 0
    for difference in fields.take(key, list):
        if type(difference) is not int:
            raise FormatError(f"{what}: {key!r} holds something that is no integer")
        value += difference
        if not low <= value <= high:
            raise FormatError(f"{what}: {key!r} gives {str(value)[:40]}, expected {low} to {high}")
        found.append(value)
    return found


def gaps(spans: Any) -> list[int]:
    """The bytes between each span (offset, nbytes) and the end of the one before it."""
    found, end = [], 0
    for offset, nbytes in spans:
        found.append(offset - end)
        end = offset + nbytes
    return found


def integer(value: Any, low: int, high: int, what: str) -> int:
    """An integer in that range, both ends included. Raises FormatError."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{what}: {str(value)[:40]!r} is not an integer from {low} to {high}")
    return value


def integers(value: Any, what: str) -> tuple[int, ...]:
    """A list of sizes, none negative. Raises FormatError."""
    return tuple(integer(n, 0, MAX_FILE, what) for n in sequence(value, what))


def sequence(value: Any, what: str) -> list[Any]:
    """A list. Raises FormatError."""
    if not isinstance(value, list):
        raise FormatError(f"{what}: {str(value)[:40]!r} is not a list")
    return value


def lists_of(value: list[Any], width: int, what: str) -> list[Any]:
    """A list of lists of that width. Raises FormatError."""
    if not all(isinstance(row, list) and len(row) == width for row in value):
        raise FormatError(f"{what}: expected lists of {width}")
    return value
