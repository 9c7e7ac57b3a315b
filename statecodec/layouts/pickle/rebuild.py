"""What the calls in a torch pickle mean, as descriptions: nothing is imported, nothing is called.

`call` is the only place that knows functions by name. A name that is not here becomes an Opaque node that keeps its
arguments, so tensors inside it are still found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from statecodec.dtypes import SUB_BYTE, DType
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
)

_MAX_RANK: Final = 64
_INT64: Final = 1 << 63
_PLAIN_TENSOR_TYPES: Final = frozenset(
    {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
)


def call(func: Any, args: Any, kwargs: DictNode | None = None) -> Any:
    """The description of `func(*args, **kwargs)`.

    Raises MalformedCheckpoint for tensors that reach outside of their storage.
    """
    if not isinstance(args, tuple):
        raise MalformedCheckpoint(f"pickle calls {func!r} with a {type(args).__name__} instead of an argument tuple")
    if type(func) is not Global:  # a callable that itself was computed
        return Opaque("", "call", (func, *args), kwargs)
    known = _KNOWN.get((func.module, func.name)) if kwargs is None or not kwargs.items else None
    if known is not None:
        made = known(args)
        if made is not None:
            return made
    return Opaque(func.module, func.name, tuple(args), kwargs)


def build(node: Any, state: Any) -> None:
    """Set an object's state (what `__setstate__` or `__dict__.update` would get)."""
    if state is None:  # nothing to set
        return
    if type(node) not in (Opaque, DictNode, TensorNode):
        raise MalformedCheckpoint(f"pickle sets attributes on a {type(node).__name__}, which has none")
    node.state = state if node.state is None else (node.state, state)


def tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: DType | None = None) -> TensorNode | None:
    """A checked window: every element that it can reach lies inside the storage's claimed size.

    None where the storage's elements have an unknown size: its bytes are carried, nothing is known of the window.
    """
    if type(storage) is not StorageNode or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise MalformedCheckpoint("pickle rebuilds a tensor from something that is no storage, shape and stride")
    if storage.numel is None:
        return None
    dtype = dtype or storage.dtype
    if len(shape) != len(stride) or len(shape) > _MAX_RANK:
        raise MalformedCheckpoint(f"tensor of storage {storage.key!r}: {len(shape)} dimensions, {len(stride)} strides")
    numel, last = 1, offset
    for value in (offset, *shape, *stride):
        if type(value) is not int or not 0 <= value < _INT64:
            raise MalformedCheckpoint(f"tensor of storage {storage.key!r}: a shape, stride or offset is out of range")
    for size, step in zip(shape, stride, strict=True):
        numel *= size
        last += (size - 1) * step
    if numel >= _INT64:
        raise MalformedCheckpoint(f"tensor of storage {storage.key!r}: claims {numel} elements")
    have = storage.numel * storage.dtype.itemsize
    if numel and (last + 1) * dtype.itemsize > have:
        raise MalformedCheckpoint(
            f"tensor of storage {storage.key!r} reaches byte {(last + 1) * dtype.itemsize} of {have}"
        )
    return TensorNode(storage, dtype, tuple(shape), tuple(stride), offset)


def _rebuild_tensor(args: tuple[Any, ...]) -> TensorNode | None:
    return tensor(args[0], args[1], args[2], args[3]) if len(args) == 4 else None


def _finish(node: TensorNode | None, requires_grad: Any, metadata: Any) -> TensorNode | None:
    if node is None:
        return None
    node.requires_grad = requires_grad is True
    if type(metadata) is DictNode:
        node.bits = frozenset(k for k, v in metadata.items if k in ("conj", "neg") and v is True)
    return node


def _rebuild_tensor_v2(args: tuple[Any, ...]) -> TensorNode | None:
    if len(args) not in (6, 7):  # storage, offset, shape, stride, requires_grad, hooks[, metadata]
        return None
    return _finish(tensor(*args[:4]), args[4], args[6] if len(args) == 7 else None)


def _rebuild_tensor_v3(args: tuple[Any, ...]) -> TensorNode | None:
    if len(args) not in (7, 8) or type(args[6]) is not DType:
        return None
    return _finish(tensor(args[0], args[1], args[2], args[3], args[6]), args[4], args[7] if len(args) == 8 else None)


def _rebuild_parameter(args: tuple[Any, ...]) -> TensorNode | None:
    if len(args) not in (3, 4) or type(args[0]) is not TensorNode:  # data, requires_grad, hooks[, state]
        return None
    data = args[0]
    node = TensorNode(data.storage, data.dtype, data.shape, data.stride, data.offset)
    node.bits, node.requires_grad, node.is_parameter = data.bits, args[1] is True, True
    node.state = args[3] if len(args) == 4 else data.state
    return node


def _rebuild_from_type(args: tuple[Any, ...]) -> Any:
    if len(args) != 4 or type(args[0]) is not Global or type(args[1]) is not Global:  # func, type, args, state
        return None
    inner = call(args[0], args[2])
    if type(inner) is TensorNode and repr(args[1]) in _PLAIN_TENSOR_TYPES:
        inner.is_parameter = inner.is_parameter or args[1].name == "Parameter"
        inner.state = args[3]
        return inner
    subclass = Opaque(args[1].module, args[1].name, (inner,))
    subclass.state = args[3]
    return subclass


def _rebuild_qtensor(args: tuple[Any, ...]) -> Opaque | None:
    if len(args) != 7:  # storage, offset, shape, stride, quantizer, requires_grad, hooks
        return None
    if type(args[0]) is StorageNode and args[0].dtype in SUB_BYTE:
        return None
    data = tensor(*args[:4])
    return None if data is None else Opaque("torch._utils", "_rebuild_qtensor", (data, *args[4:]))


def _rebuild_from_cpu_tensor(args: tuple[Any, ...]) -> TensorNode | None:
    if len(args) != 4 or type(args[0]) is not TensorNode or args[0].dtype is not args[1]:  # data, dtype, device, grad
        return None
    return _finish(args[0], args[3], None)


def _size(args: tuple[Any, ...]) -> SizeNode | None:
    if len(args) == 1 and isinstance(args[0], tuple) and all(type(n) is int and abs(n) < _INT64 for n in args[0]):
        return SizeNode(args[0])
    return None


def _device(args: tuple[Any, ...]) -> DeviceNode | None:
    kinds = tuple(type(a) for a in args)
    return DeviceNode(args) if kinds in ((str,), (str, int)) else None


def _dict(kind: str) -> Callable[[tuple[Any, ...]], DictNode | None]:
    def make(args: tuple[Any, ...]) -> DictNode | None:
        node = DictNode(kind)
        if kind == "defaultdict" and args:
            node.factory, args = args[0], args[1:]
        if not args:
            return node
        if len(args) != 1:
            return None
        pairs = args[0].items if type(args[0]) is DictNode else args[0]
        if type(pairs) is not list or not all(type(p) in (tuple, list) and len(p) == 2 for p in pairs):
            return None
        node.items = [(k, v) for k, v in pairs]
        return node

    return make


def _items(args: tuple[Any, ...]) -> list[Any] | None:
    if not args:
        return []
    return list(args[0]) if len(args) == 1 and type(args[0]) in (list, tuple) else None


def _set(frozen: bool) -> Callable[[tuple[Any, ...]], SetNode | None]:
    def make(args: tuple[Any, ...]) -> SetNode | None:
        items = _items(args)
        return None if items is None else SetNode(items, frozen)

    return make


def _encode(args: tuple[Any, ...]) -> bytes | None:
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):  # how protocol 2 spells bytes
        return args[0].encode("latin-1")
    return None


def _bytes(args: tuple[Any, ...]) -> bytes | None:
    return b"" if not args else None


def _bytearray(args: tuple[Any, ...]) -> bytearray | None:
    if not args:
        return bytearray()
    if type(args[0]) is bytes and len(args) == 1:
        return bytearray(args[0])
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
        return bytearray(args[0].encode("latin-1"))
    return None


def _complex(args: tuple[Any, ...]) -> complex | None:
    return complex(*args) if len(args) == 2 and all(type(a) in (int, float) for a in args) else None


def _reconstruct_object(args: tuple[Any, ...]) -> Opaque | None:
    if len(args) == 3 and type(args[0]) is Global:  # copyreg._reconstructor(cls, base, state), protocols 0 and 1
        return Opaque(args[0].module, args[0].name, () if args[2] is None else (args[2],))
    return None


def _newobj(args: tuple[Any, ...]) -> Any:
    return call(args[0], args[1:]) if args else None


_KNOWN: Final[dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_from_cpu_tensor,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _dict("OrderedDict"),
    ("collections", "defaultdict"): _dict("defaultdict"),
    ("collections", "Counter"): _dict("Counter"),
    ("builtins", "dict"): _dict("dict"),
    ("builtins", "list"): _items,
    ("builtins", "set"): _set(frozen=False),
    ("builtins", "frozenset"): _set(frozen=True),
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): _complex,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstruct_object,
    ("copyreg", "__newobj__"): _newobj,
}
