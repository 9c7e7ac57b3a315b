"""What unpickling a stream would import, found by reading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.machine import Machine
from statecodec.layouts.pickle.reader import run
from statecodec.layouts.pickle.seen import seen

_MAX_OPERAND: Final = 16


@dataclass(frozen=True, slots=True)
class Imports:
    """What reading one stream found."""

    names: frozenset[tuple[str, str]]
    """Module and name of every global, up to where it could not be read any more."""
    stop: int
    """Where reading stopped."""
    unread: str | None
    """Why it could not be read as a whole."""
    called: bool
    """Whether unpickling would have called something by then."""
    cut_off: bool
    """It goes on beyond the bytes that were given."""
    followed: bool = True
    """Whether Python's unpickler stops where reading did. It may go on where this is false."""


def imports(data: bytes) -> Imports:
    """What unpickling the stream that `data` begins with would import; anything may follow it."""
    known = seen(data)
    if known is not None:
        names, stop, called = known
        return Imports(names, stop, None, called, cut_off=False)
    machine, unread, cut_off = Machine(data), None, False
    try:
        run(machine, "the pickle")
    except MalformedCheckpoint as error:
        unread = str(error)
        cut_off = machine.pos + _MAX_OPERAND > len(data)
    return Imports(machine.names, machine.pos, unread, machine.called, cut_off, machine.followed)
