"""Reads the pickle of a torch checkpoint (protocols 0-5) into descriptions, executing nothing.

One small function per opcode (opcodes.py) works on a stack of nodes (nodes.py); calls are interpreted by name
(rebuild.py). Time and memory are bounded by the length of the stream: nothing that the stream claims is allocated
before the bytes are there, and the number of objects is limited in proportion to it.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.machine import Machine
from statecodec.layouts.pickle.opcodes import STOP, TABLE
from statecodec.layouts.pickle.seen import remember

MAX_PICKLE_BYTES: Final = 512 << 20


def read_pickle(data: bytes, name: str = "data.pkl") -> Any:
    """The description of the object that `data` pickles (see nodes.py for the types).

    Raises MalformedCheckpoint for a stream that is truncated, inconsistent, or makes far more objects than a checkpoint
    of its length would; `name` is how messages call it.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise MalformedCheckpoint(f"{name} has {len(data)} bytes; more than {MAX_PICKLE_BYTES} are not read")
    machine = Machine(data)
    root = run(machine, name)
    remember(machine)
    return root


def run(machine: Machine, name: str) -> Any:
    """Read one stream, from the machine's position to its STOP. Raises MalformedCheckpoint, as `read_pickle` does."""
    try:
        return _run(machine)
    except MalformedCheckpoint as error:
        raise MalformedCheckpoint(f"{name}, byte {machine.pos}: {error}") from None
    except (IndexError, KeyError, ValueError, OverflowError, struct.error) as error:
        raise MalformedCheckpoint(
            f"{name}, byte {machine.pos}: not a whole pickle stream ({type(error).__name__}); it is damaged"
        ) from None


def _run(machine: Machine) -> Any:
    data, stack, limit, table = machine.data, machine.stack, machine.limit, TABLE
    while True:
        op = data[machine.pos]
        machine.pos += 1
        if op == STOP:
            return stack.pop()
        table[op](machine)
        if len(stack) > limit or machine.made > limit:
            raise machine.not_followed(f"makes more than {limit} objects from {len(data)} bytes")
