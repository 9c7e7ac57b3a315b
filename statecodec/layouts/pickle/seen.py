"""Remembers which globals a stream named, so that a long one is not read twice to find out what it would import."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

from statecodec.layouts.pickle.machine import Machine

_SHORT: Final = 1 << 12  # bytes of a stream that is as quickly read again as its hash is made
_MOST_NAMES: Final = 1000
_MOST_NAME_CHARS: Final = 1 << 16
_STREAMS: Final = 16

Seen = tuple[frozenset[tuple[str, str]], int, bool]
"""The names of its globals, where it stopped, and whether something was called."""

_seen: OrderedDict[bytes, Seen] = OrderedDict()


def remember(machine: Machine) -> None:
    """Remember what a machine found that has read its whole stream."""
    if len(machine.data) <= _SHORT or len(machine.globals) > _MOST_NAMES:
        return
    names = machine.names
    if sum(len(module) + len(name) for module, name in names) <= _MOST_NAME_CHARS:
        _seen[_key(machine.data)] = names, machine.pos, machine.called
        while len(_seen) > _STREAMS:
            _seen.popitem(last=False)


def seen(data: bytes) -> Seen | None:
    """What reading these very bytes found; None if they were not read yet."""
    return _seen.get(_key(data)) if len(data) > _SHORT else None


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
