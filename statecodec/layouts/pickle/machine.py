"""The stack machine that pickle opcodes (opcodes.py) work on. It is bounded, and trusts nothing the stream claims."""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import Any, Final

from statecodec import dtypes
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.nodes import Global, StorageNode

_FREE_OBJECTS: Final = 500_000


class Machine:
    """The state of a pickle stream that is being read, and what opcodes do to it."""

    __slots__ = (
        "called", "data", "followed", "globals", "limit", "made", "marks", "memo", "pos", "protocol", "stack",
        "storages",
    )  # fmt: skip

    def __init__(self, data: bytes) -> None:
        self.data, self.pos, self.made = data, 0, 0
        self.protocol = 0
        self.called = False
        """Whether something was called, if only to be described."""
        self.followed = True
        """False where Python's unpickler may go on. All other errors are errors there, too."""
        self.limit = _FREE_OBJECTS + len(data) // 4
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        """Every global that was named, used or not, as the stream spells it."""
        self.storages: dict[str, StorageNode] = {}

    @property
    def names(self) -> frozenset[tuple[str, str]]:
        """Module and name of every global, as Python 3 spells them."""
        named = self.globals.items()
        return frozenset((node.module, node.name) if type(node) is Global else key for key, node in named)

    def cut_off(self, why: str) -> MalformedCheckpoint:
        """The error for a stream that ends before its STOP."""
        self.pos = len(self.data)
        return MalformedCheckpoint(why)

    def not_followed(self, why: str) -> MalformedCheckpoint:
        """The error for what Python's unpickler may do, and this reader does not."""
        self.followed = False
        return MalformedCheckpoint(why)

    def take(self, n: int) -> bytes:
        """The next `n` bytes. Raises MalformedCheckpoint at the end of the stream."""
        start, end = self.pos, self.pos + n
        if end > len(self.data):
            raise self.cut_off(f"claims {n} bytes where {len(self.data) - start} are left")
        self.pos = end
        return self.data[start:end]

    def line(self) -> bytes:
        """The bytes up to the next newline."""
        end = self.data.find(b"\n", self.pos)
        if end < 0:
            raise self.cut_off("holds a line without an end")
        found = self.data[self.pos : end]
        self.pos = end + 1
        return found

    def push(self, node: Any) -> None:
        """Push a node, counted against the limit."""
        self.made += 1
        self.stack.append(node)

    def since_mark(self) -> list[Any]:
        """Pop everything above the topmost mark, and the mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def remember(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        self.memo[index] = self.stack[-1]
        if len(self.memo) > self.limit:
            raise self.not_followed(f"remembers more than {self.limit} objects")

    def named(self, module: Any, name: Any) -> Any:
        """The node of a global, with the spelling of Python 3."""
        if type(module) is not str or type(name) is not str:
            raise MalformedCheckpoint("names a global by something that is no string")
        found = self.globals.get((module, name))
        if found is None:
            new = (module, name)
            if self.protocol < 3:  # they spell modules as Python 2 did
                new = NAME_MAPPING.get(new) or (IMPORT_MAPPING.get(module, module), name)
            found = dtypes.TORCH.get(name) if module == "torch" else None
            found = self.globals[module, name] = Global(*new) if found is None else found
        return found
