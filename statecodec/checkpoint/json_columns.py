"""Numbers of an untrusted document: columns of differences, and values that must lie in a range."""

from __future__ import annotations

from typing import Any

from statecodec.errors import FormatError
from statecodec.strict import Fields

MAX_FILE = 1 << 50  # bytes


def differences(values: Any) -> list[int]:
    """Each value minus the one before it. Numbers that rise evenly give one number again and again, which packs."""
    gained, last = [], 0
    for value in values:
        gained.append(value - last)
        last = value
    return gained


def summed(fields: Fields, key: str, low: int, high: int, where: str) -> list[int]:
    """The inverse of `differences`, each value checked against its range. Raises FormatError."""
    sums, value = [], 0
    for difference in fields.take(key, list):
        if type(difference) is not int:
            raise FormatError(f"{where}: {key!r} holds something that is no integer")
        value += difference
        if not low <= value <= high:
            raise FormatError(f"{where}: {key!r} gives {str(value)[:40]}, expected {low} to {high}")
        sums.append(value)
    return sums


def gaps(spans: Any) -> list[int]:
    """The bytes between each span (offset, nbytes) and the end of the span before it."""
    sizes, end = [], 0
    for offset, nbytes in spans:
        sizes.append(offset - end)
        end = offset + nbytes
    return sizes


def integer(value: Any, low: int, high: int, where: str) -> int:
    """An integer in that range, both ends included. Raises FormatError."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{where}: {str(value)[:40]!r} is not an integer from {low} to {high}")
    return value


def integers(value: Any, most: int, where: str) -> tuple[int, ...]:
    """A list of sizes, none negative. Raises FormatError."""
    return tuple(integer(n, 0, most, where) for n in sequence(value, where))


def sequence(value: Any, where: str) -> list[Any]:
    """A list. Raises FormatError."""
    if not isinstance(value, list):
        raise FormatError(f"{where}: {str(value)[:40]!r} is not a list")
    return value


def lists_of(value: list[Any], width: int, where: str) -> list[Any]:
    """A list of lists of that width. Raises FormatError."""
    if not all(isinstance(row, list) and len(row) == width for row in value):
        raise FormatError(f"{where}: expected lists of {width}")
    return value
