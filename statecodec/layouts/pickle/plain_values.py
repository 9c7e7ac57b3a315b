"""Turns opaque nodes into real values, where that is exact and runs nothing that the file chooses.

These are numpy arrays and scalars of plain numbers (RNG states hold them), sparse and meta tensors, range and slice.
What is not of the exact shape expected here stays opaque.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

import numpy as np

from statecodec.dtypes import DType
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.nodes import Global, Opaque
from statecodec.lazy import torch

_NUMPY_CORES: Final = ("numpy.core", "numpy._core")
_PLAIN_DTYPE: Final = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")
_SPARSE_COMPRESSED: Final = {
    "torch.sparse_csr": "sparse_csr",
    "torch.sparse_csc": "sparse_csc",
}


def plain(node: Opaque) -> Any:
    """The value of an opaque node that holds no other nodes; None if it is not plain."""
    name, args = f"{node.module}.{node.name}", node.args
    if name == "torch._utils._rebuild_meta_tensor_no_storage" and len(args) == 4:
        dtype, shape, stride, _ = args
        if type(dtype) is DType and _sizes(shape) and _sizes(stride) and len(shape) == len(stride):
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype.torch, device="meta")
    if name in ("builtins.range", "builtins.slice") and 1 <= len(args) <= 3:
        if name == "builtins.slice" and all(type(a) in (int, type(None)) for a in args):
            return slice(*args)
        if all(type(a) is int for a in args) and (len(args) < 3 or args[2] != 0):
            return range(*args)
    return _numpy(node)


def sparse(node: Opaque, args: Any) -> Any:
    """A sparse tensor from the already rebuilt arguments of `_rebuild_sparse_tensor`; None if it is none we know.

    Raises MalformedCheckpoint where indices lie outside of the tensor.
    """
    layout = node.args[0] if node.args else None
    if type(layout) is not Opaque or layout.name != "_get_layout" or len(layout.args) != 1 or len(args) != 2:
        return None
    kind, data = layout.args[0], args[1]
    make_coo: Any = torch.sparse_coo_tensor  # the stubs know one of its overloads only
    make_compressed: Any = torch.sparse_compressed_tensor
    try:
        if kind == "torch.sparse_coo" and len(data) in (3, 4):
            coalesced = data[3] if len(data) == 4 else None
            return make_coo(*data[:2], tuple(data[2]), check_invariants=True, is_coalesced=coalesced)
        if type(kind) is str and kind in _SPARSE_COMPRESSED and len(data) == 4:
            return make_compressed(
                *data[:3], tuple(data[3]), layout=getattr(torch, _SPARSE_COMPRESSED[kind]), check_invariants=True
            )
    except (RuntimeError, TypeError, ValueError) as error:
        raise MalformedCheckpoint(f"sparse tensor that contradicts itself: {str(error).splitlines()[0]}") from None
    return None


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and all(type(n) is int and 0 <= n < 1 << 40 for n in value)
        and math.prod(value) < 1 << 60
    )


def _numpy(node: Opaque) -> Any:
    if node.kwargs is not None or node.items or node.elements:
        return None
    args, state = node.args, node.state
    if _is(node, "multiarray", "scalar") and len(args) == 2:
        array = _array(args[1], args[0], (), fortran=False)
        return None if array is None else array[()]
    if _is(node, "numeric", "_frombuffer") and len(args) == 4:  # numpy under protocol 5: buffer, dtype, shape, order
        return _array(args[0], args[1], args[2], fortran=args[3] == "F") if args[3] in ("C", "F") else None
    made = _is(node, "multiarray", "_reconstruct") and len(args) == 3 and repr(args[0]) == "numpy.ndarray"
    if made and type(state) is tuple and len(state) == 5:  # version, shape, dtype, is_fortran, bytes
        array = _array(state[4], state[2], state[1], fortran=state[3] is True)
        # ndarray.__setstate__ swaps to the machine's byte order, and so must we to give the same dtype.
        return None if array is None else array.astype(array.dtype.newbyteorder("="), copy=False)
    return None


def _is(node: Opaque, module: str, name: str) -> bool:
    return node.name == name and node.module in [f"{core}.{module}" for core in _NUMPY_CORES]


def _array(data: Any, dtype_node: Any, shape: Any, *, fortran: bool) -> np.ndarray[Any, Any] | None:
    dtype = _dtype(dtype_node)
    if dtype is None or type(data) not in (bytes, bytearray) or not _sizes(shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(data):
        raise MalformedCheckpoint(f"numpy array of {dtype} {shape} with {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy(order="K")


def _dtype(node: Any) -> np.dtype[Any] | None:
    """A plain dtype from `numpy.dtype('f8', False, True)` with state (3, '<', None, None, None, -1, -1, 0)."""
    if type(node) is not Opaque or (node.module, node.name) != ("numpy", "dtype") or not node.args:
        return None
    code, state = node.args[0], node.state
    if type(code) is not str or not _PLAIN_DTYPE.fullmatch(code):
        return None
    order = state[1] if type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None) else None
    return np.dtype(order + code) if order in ("<", ">", "|", "=") else None


BUILTIN_FACTORIES: Final[dict[str, type]] = {
    f"builtins.{kind.__name__}": kind for kind in (int, float, str, list, dict, set, tuple, bool)
}
"""What a defaultdict may have as its factory."""


def factory(node: Any) -> type | None:
    """The factory of a defaultdict, if it is a builtin type; None otherwise."""
    return BUILTIN_FACTORIES.get(repr(node)) if type(node) is Global else None
