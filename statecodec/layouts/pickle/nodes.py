"""The node types that reading a pickle yields: descriptions of objects, never the objects.

None, bool, int, float, complex, str, bytes, bytearray, tuple and list are used as they are (plain values that hold
nodes or nothing), and a DType for torch's. Dicts and sets keep their items in lists: building real ones would hash
hostile keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from statecodec.dtypes import DType


class Global:
    """A class or function that the pickle names. It is never imported."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class SizeNode(tuple[int, ...]):
    """A torch.Size."""

    __slots__ = ()


class DeviceNode:
    """A torch.device, by the arguments of its constructor."""

    __slots__ = ("args",)

    def __init__(self, args: tuple[str] | tuple[str, int]) -> None:
        self.args = args


class DictNode:
    """A dict, OrderedDict, defaultdict or Counter. `state` holds attributes set on it (`_metadata` of a state_dict)."""

    __slots__ = ("_strings", "factory", "items", "kind", "state")

    def __init__(self, kind: str = "dict", factory: Any = None) -> None:
        self.kind, self.factory = kind, factory
        self.state: Any = None
        self.items: list[tuple[Any, Any]] = []
        self._strings: dict[str, Any] | None = None

    def strings(self) -> dict[str, Any]:
        """The items with string keys, as a real dict (computed once: call it only when reading is over)."""
        if self._strings is None:
            self._strings = {k: v for k, v in self.items if type(k) is str}
        return self._strings

    def get(self, key: str) -> Any:
        """The value of a string key, or None."""
        return self.strings().get(key)


class SetNode:
    """A set or frozenset."""

    __slots__ = ("frozen", "items")

    def __init__(self, items: list[Any], frozen: bool) -> None:
        self.items, self.frozen = items, frozen


class StorageNode:
    """A reference to a storage: an archive entry `data/KEY` of `numel` elements of dtype.

    `numel` is None until the archive is known where the storage's class is one that this version of torch lacks.
    """

    __slots__ = ("dtype", "key", "location", "numel", "untyped")

    def __init__(self, key: str, dtype: DType, location: str, numel: int | None, untyped: bool) -> None:
        self.key, self.dtype, self.location, self.numel, self.untyped = key, dtype, location, numel, untyped


class TensorNode:
    """A strided window into a storage. `offset` and `stride` count elements of dtype."""

    __slots__ = (
        "bits", "dtype", "index", "is_parameter", "offset", "requires_grad", "shape", "state", "storage", "stride",
    )  # fmt: skip

    def __init__(
        self, storage: StorageNode, dtype: DType, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> None:
        self.storage, self.dtype, self.shape, self.stride, self.offset = storage, dtype, shape, stride, offset
        self.index = -1
        """Its number among the file's tensors, once they are numbered (describe.py)."""
        self.requires_grad = False
        self.is_parameter = False
        self.bits: frozenset[str] = frozenset()
        """"conj" and/or "neg": lazily conjugated or negated views."""
        self.state: Any = None
        """Python attributes set on the tensor."""


class Opaque:
    """An object of a class that is not understood: what it was made from, by name."""

    __slots__ = ("args", "elements", "items", "kwargs", "module", "name", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...] = (), kwargs: DictNode | None = None) -> None:
        self.module, self.name, self.args, self.kwargs = module, name, args, kwargs
        self.state: Any = None
        self.elements: list[Any] = []
        """What was appended (list subclasses, sets, deques)."""
        self.items: list[tuple[Any, Any]] = []
        """What was set by key (dict subclasses)."""

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}>"


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """(key, child) of every node directly below, in order; keys of attributes and constructor arguments are strings."""
    kind = type(node)
    if kind is DictNode:
        yield from node.items
        if node.state is not None:
            yield "state", node.state
    elif kind is list or kind is tuple:
        yield from enumerate(node)
    elif kind is SetNode:
        yield from enumerate(node.items)
    elif kind is TensorNode:
        if node.state is not None:
            yield "state", node.state
    elif kind is Opaque:
        if node.args:
            yield "args", node.args
        if node.kwargs is not None:
            yield "kwargs", node.kwargs
        yield from enumerate(node.elements)
        yield from node.items
        if type(node.state) is DictNode:  # attributes read like keys: module._parameters.weight
            yield from node.state.items
        elif node.state is not None:
            yield "state", node.state
