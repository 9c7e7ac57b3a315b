"""What all Triton launches share: the device check, the interpreter, options, the flag word.

Kernels are compiled with `enable_fp_fusion=False`, because a contracted multiply-add rounds once where the
specification rounds twice; where a fused operation is wanted it is written `tl.fma`. Division and square root are
`div_rn` and `sqrt_rn`. Integer arguments are annotated `tl.int64`: without that, Triton makes a compile-time constant,
which is no tensor, of one that equals 1, and a 32-bit number of one that fits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.errors import BackendUnavailable
from statecodec.kernels.curves import Curve
from statecodec.kernels.grids import LogGrid

# Decided when the kernels are decorated, so it is read once, at import.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# The interpreter's time is per operation, not per element: it gets huge tiles. On a GPU 16 elements a thread, 4 warps.
TILE = 1 << 16 if INTERPRETED else 2048
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context to launch in. Raises BackendUnavailable for tensors that Triton cannot reach."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and INTERPRETED:
        return nullcontext()
    raise BackendUnavailable(
        f"backend 'triton' was given a tensor on {tensor.device}: it needs CUDA tensors "
        "(on the CPU use 'cpu' or 'reference'; TRITON_INTERPRET=1, set before Python starts, is for tests)"
    )


def run(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch so many programs of a kernel, if any, on the device of its first argument, a tensor."""
    with on(args[0]):
        if programs:
            kernel[(programs,)](*args, **constants, **OPTIONS)


def flag_word(like: Tensor) -> Tensor:
    """A zeroed int32 on the device, where kernels write their findings; `flags_on_host` reads it."""
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def flags_on_host(flags: Tensor) -> int:
    """What a launch has found; waits for it, unless values are trusted."""
    return 0 if kernels.trusted() else int(to_host(flags)[0])


def to_host(small: Tensor) -> Tensor:
    """A few numbers from the device, once all work queued before is done; other threads can use the core meanwhile."""
    if small.device.type != "cuda":
        return small
    there = small.to("cpu", non_blocking=True)
    done = torch.cuda.Event(blocking=True)
    done.record()
    done.synchronize()
    return there


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=128)
def decode_table(coded: Curve | LogGrid, device: torch.device) -> Tensor:
    """The values of all codes, on the device; those of a curve are 1 KiB at most and stay in the L1 caches."""
    return torch.from_numpy(coded.table).to(device)
