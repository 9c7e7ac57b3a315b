"""Rebuilds the nested object that torch.load would give, without running what the file names.

Unknown classes and functions come back as OpaqueObject. Objects that were shared are shared again, cycles are cycles,
and tensors on one storage share memory. Everything is iterative: depth costs no Python stack.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from statecodec.dtypes import DType
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.nodes import (
    DeviceNode,
    DictNode,
    Global,
    Opaque,
    SetNode,
    SizeNode,
    StorageNode,
    TensorNode,
    children,
)
from statecodec.layouts.pickle.plain_values import factory, plain, sparse
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TensorSource: TypeAlias = "Callable[[str, DType, tuple[int, ...], tuple[int, ...], int], Tensor]"
"""(storage key, dtype, shape, stride, offset in elements) -> that window; windows of one storage must share memory."""

_MAX_KEY_PARTS: Final = 10_000
_MAX_KEY_DEPTH: Final = 100
_COMPOUND: Final = frozenset({DictNode, list, tuple, SetNode, Opaque, TensorNode, StorageNode, Global})


class OpaqueObject:
    """An object of a class that was not run: the name of its class, and what it was made from.

    `kwargs` are further arguments; `state` is what `__setstate__` would get (usually its attributes); `elements` and
    `items` are what was appended or set by key.

    Args:
        module: The module of its class or function.
        name: The name in that module.
        args: What the class would be called with; None where the file refers to the class or function itself.
    """

    def __init__(self, module: str, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.module, self.name, self.args = module, name, args
        self.kwargs: dict[Any, Any] = {}
        self.state: Any = None
        self.elements: list[Any] = []
        self.items: list[tuple[Any, Any]] = []

    def __repr__(self) -> str:
        if self.args is None:
            return f"<opaque reference to {self.module}.{self.name}>"
        inside = f" with {', '.join(map(str, self.state))[:120]}" if type(self.state) is dict and self.state else ""
        return f"<opaque {self.module}.{self.name}{inside}>"


def window(storage: Tensor, dtype: DType, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """View a strided tensor in the memory of a storage; nothing is copied.

    Args:
        storage: 1-D uint8, from its storage's first byte.
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        stride: In elements of dtype.
        offset: In elements of dtype, from the storage's first byte.

    Returns:
        The tensor.
    """
    empty = torch.empty(0, dtype=dtype.torch, device=storage.device)
    return empty.set_(storage.untyped_storage(), offset, shape, stride)


def build(root: Any, tensor: TensorSource) -> Any:
    """The object that a graph describes, its tensors supplied by `tensor`. Raises MalformedCheckpoint."""
    return _Builder(tensor).build(root)


class _Builder:
    """Turns nodes into objects, each once. Mutable objects exist before their contents, so cycles close."""

    def __init__(self, tensor: TensorSource) -> None:
        self.tensor = tensor
        self.built: dict[int, Any] = {}

    def build(self, root: Any) -> Any:
        pending = [(root, False)]
        while pending:
            node, children_made = pending.pop()
            if type(node) not in _COMPOUND:
                continue
            if children_made:
                self.fill(node)
            elif id(node) not in self.built:
                self.start(node)
                pending.append((node, True))
                for key, child in children(node):
                    pending += [(child, False), (key, False)]
                if type(node) is Opaque and type(node.state) is DictNode:
                    pending.append((node.state, False))  # whose items, not itself, are its children
        return self.value(root)

    def value(self, node: Any) -> Any:
        kind = type(node)
        if kind in _COMPOUND:
            return self.built[id(node)]
        return _OF_TORCH[kind](node) if kind in _OF_TORCH else node

    def start(self, node: Any) -> None:
        """Make what can exist before its contents do."""
        value: Any = None
        if type(node) is list:
            value = []
        elif type(node) is DictNode:
            value = _empty_dict(node)
        elif type(node) is SetNode and not node.frozen:
            value = set()
        elif type(node) is Global:
            value = OpaqueObject(node.module, node.name)
        elif type(node) is TensorNode:
            value = self.make_tensor(node)
        elif type(node) is StorageNode:
            value = self.tensor(node.key, node.dtype, (node.numel or 0,), (1,), 0)
            value = value.untyped_storage() if node.untyped else value
        elif type(node) is Opaque and node.name != "_rebuild_sparse_tensor":
            value = plain(node)
            value = OpaqueObject(node.module, node.name) if value is None else value
        if value is not None:
            self.built[id(node)] = value

    def make_tensor(self, node: TensorNode) -> Tensor:
        tensor = self.tensor(node.storage.key, node.dtype, node.shape, node.stride, node.offset)
        if "conj" in node.bits and tensor.is_complex():
            tensor = tensor.conj()
        if "neg" in node.bits:
            tensor = torch._neg_view(tensor)
        grad = node.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
        if node.is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=grad)
        return tensor.requires_grad_() if grad else tensor

    def fill(self, node: Any) -> None:
        """Put contents into what `start` made, and make what could not exist without its contents."""
        value: Any = self.built.get(id(node))
        if type(node) is tuple and value is None:
            self.built[id(node)] = tuple(map(self.value, node))
        elif type(node) is list:
            value[:] = map(self.value, node)
        elif type(node) is SetNode:
            items = self.hashable(list(map(self.value, node.items)))
            if node.frozen:
                self.built.setdefault(id(node), frozenset(items))
            else:
                value.update(items)
        elif type(node) is DictNode:
            keys = self.hashable([self.value(k) for k, _ in node.items])
            # Counter.update would add; dict.update on an OrderedDict would bypass its order.
            update = OrderedDict.update if type(value) is OrderedDict else dict.update
            update(value, zip(keys, (self.value(v) for _, v in node.items), strict=True))
            self.attributes(node, value)
        elif type(node) is TensorNode:
            self.attributes(node, value)
        elif type(node) is Opaque:
            self.fill_opaque(node, value)

    def fill_opaque(self, node: Opaque, value: Any) -> None:
        args = self.value(node.args) if node.args else ()
        if value is None:
            value = self.built[id(node)] = sparse(node, args) if node.module == "torch._utils" else None
            if value is None:
                value = self.built[id(node)] = OpaqueObject(node.module, node.name)
        if type(value) is OpaqueObject:
            value.args, value.state = args, self.value(node.state)
            value.kwargs = {} if node.kwargs is None else self.value(node.kwargs)
            value.elements = list(map(self.value, node.elements))
            value.items = [(self.value(k), self.value(v)) for k, v in node.items]

    def attributes(self, node: DictNode | TensorNode, value: Any) -> None:
        """Set attributes such as `_metadata` of a state_dict in the instance's own dict: no descriptor ever runs."""
        if type(node.state) is DictNode and hasattr(value, "__dict__"):
            value.__dict__.update({k: self.value(v) for k, v in node.state.items if type(k) is str})

    def hashable(self, keys: list[Any]) -> list[Any]:
        """The keys, if they can be keys; refuses sets of them that were made to collide."""
        for key in keys:
            if type(key) is tuple:
                _check_small(key)
        try:
            distinct = len(set(map(hash, keys)))
        except TypeError:
            raise MalformedCheckpoint("a dict or set has a key that cannot be hashed") from None
        if len(keys) > 1000 and distinct * 8 < len(keys) and len({id(k) for k in keys}) > distinct * 2:
            raise MalformedCheckpoint(f"a dict of {len(keys)} keys whose hashes collide on purpose")
        return keys


def _device(node: DeviceNode) -> Any:
    try:
        return torch.device(*node.args)
    except RuntimeError:  # a device type of another build
        return OpaqueObject("torch", "device", node.args)


_OF_TORCH: Final[dict[type, Callable[[Any], Any]]] = {
    DType: lambda dtype: dtype.torch,
    SizeNode: lambda sizes: torch.Size(sizes),
    DeviceNode: _device,
}
"""Descriptions of torch's plain values -> the values."""


def _empty_dict(node: DictNode) -> Any:
    if node.kind == "OrderedDict":
        return OrderedDict()
    if node.kind == "Counter":
        return Counter()
    return defaultdict(factory(node.factory)) if node.kind == "defaultdict" else {}


def _check_small(key: tuple[Any, ...]) -> None:
    """Refuse tuples whose hash would recurse deeply or visit a shared part over and over."""
    parts: list[tuple[Any, int]] = [(key, 0)]
    visited = 0
    while parts:
        part, depth = parts.pop()
        visited += 1
        if visited > _MAX_KEY_PARTS or depth > _MAX_KEY_DEPTH:
            raise MalformedCheckpoint("a dict or set has a tuple of unreasonable size or depth as a key")
        if type(part) is tuple:
            parts += [(p, depth + 1) for p in part]
