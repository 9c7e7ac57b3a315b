"""Tensors as numpy arrays without a copy, including the dtypes numpy lacks, and the jit that every kernel uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels.cpu.compiled import compiled

F = TypeVar("F", bound=Callable[..., Any])
Memory: TypeAlias = Tensor | NDArray[Any]
"""What the kernels that packing calls take: it has numpy arrays, of which views cost less than of tensors."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kernel(function: F) -> F:
    """Compile to machine code that releases the GIL; cached on disk; IEEE division (no exceptions, no fast-math)."""
    return compiled(function, error_model="numpy")


def summing_kernel(function: F) -> F:
    """Like `kernel`, but additions may be reassociated, so that sums vectorise; results agree to rounding only."""
    return compiled(function, error_model="numpy", fastmath={"reassoc"})


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as a numpy array of signed integers (unsigned bytes for one-byte dtypes), same shape."""
    return (tensor.detach() if tensor.requires_grad else tensor).view(_BITS[tensor.element_size()]).numpy()


def array_of(memory: Memory) -> NDArray[Any]:
    """A tensor's memory as a numpy array of its own dtype (one that numpy has), same shape; an array as it is."""
    if isinstance(memory, np.ndarray):
        return memory
    return (memory.detach() if memory.requires_grad else memory).numpy()
