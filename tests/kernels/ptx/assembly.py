"""Inline assembly in Triton's interpreter, which knows none: each text is read by the interpreter of PTX."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.ptx.machine import Machine

KINDS = {"f": tl.float32, "r": tl.int32, "l": tl.int64}


def install() -> None:
    """Let the interpreter run assembly, in this process from now on."""
    InterpreterBuilder.create_inline_asm = _create_inline_asm


@cache
def _machine(text: str) -> Machine:
    return Machine.of_assembly(text)


def _create_inline_asm(
    builder: InterpreterBuilder, text: str, constraints: str, operands: list[TensorHandle], *_: Any
) -> Any:
    """What Triton calls; one register an operand, one thread an element."""
    outputs = [KINDS[kind[1:]] for kind in constraints.split(",") if kind[0] == "="]
    data = np.broadcast_arrays(*(operand.data for operand in operands))
    found = _machine(text).assembly([x.reshape(-1) for x in data], [_numpy(kind) for kind in outputs])
    results = [TensorHandle(x.reshape(data[0].shape), kind) for x, kind in zip(found, outputs, strict=True)]
    return SimpleNamespace(get_result=results.__getitem__)


def _numpy(kind: tl.dtype) -> np.dtype[Any]:
    return np.dtype(f"{'f' if kind.is_floating() else 'i'}{kind.primitive_bitwidth // 8}")
