"""The stack machine that pickle opcodes (opcodes.py) work on: bounded, and blind to what the stream claims."""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import Any, Final

from statecodec import dtypes
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.nodes import Global, StorageNode

_FREE_OBJECTS: Final = 500_000


class Machine:
    """The state of a pickle stream that is being read, and what opcodes do to it."""

    __slots__ = ("data", "globals", "limit", "made", "marks", "memo", "pos", "stack", "storages")

    def __init__(self, data: bytes) -> None:
        self.data, self.pos, self.made = data, 0, 0
        self.limit = _FREE_OBJECTS + len(data) // 4
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.storages: dict[str, StorageNode] = {}

    def take(self, n: int) -> bytes:
        start, end = self.pos, self.pos + n
        if end > len(self.data):
            raise MalformedCheckpoint(f"claims {n} bytes where {len(self.data) - start} are left")
        self.pos = end
        return self.data[start:end]

    def line(self) -> bytes:
        end = self.data.index(b"\n", self.pos)
        found = self.data[self.pos : end]
        self.pos = end + 1
        return found

    def push(self, node: Any) -> None:
        self.made += 1
        self.stack.append(node)

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        if len(self.memo) > self.limit:
            raise MalformedCheckpoint(f"remembers more than {self.limit} objects")

    def named(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise MalformedCheckpoint("names a global by something that is no string")
        found = self.globals.get((module, name))
        if found is None:
            # Protocols below 3 spell modules as Python 2 did; no module of Python 3 has one of those names.
            new = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
            found = dtypes.TORCH.get(name) if module == "torch" else None
            found = self.globals[module, name] = Global(*new) if found is None else found
        return found
