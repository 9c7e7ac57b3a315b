"""The published flashoptim package on a CPU: its quantising kernels run under Triton's interpreter.

The package quantises on a GPU only. What is replaced here is what asks for one; arithmetic, states and state dicts are
its own. TRITON_INTERPRET=1 must stand in the environment before triton is imported.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch


def flash(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """FlashAdamW and its like, which quantise CPU tensors."""
    import triton
    import triton.language as tl
    from flashoptim import optimizers as package
    from triton.runtime.autotuner import Autotuner

    for kernel in vars(package).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = [triton.Config({"BLOCK_SIZE_N": 1 << 14})]  # few turns of its loop; trying out needs a GPU
    package.torch = _TorchWithCuda()
    package.libdevice = SimpleNamespace(copysign=lambda x, y: tl.where(y < 0, -tl.abs(x), tl.abs(x)))
    package._get_sm_count = lambda *_: 1
    package._MaybeQuantizedTensor.set_data = _set_data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return getattr(package, name)(params, fused=False, **options)


class _TorchWithCuda:
    cuda = SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _set_data(self: Any, data: torch.Tensor) -> None:
    """As the package's own, which refuses tensors on a CPU."""
    from flashoptim.optimizers import quantize

    if not self._try_quantize:
        self._data = data.to(dtype=self._storage_dtype)
        return
    self._data = None
    self._quantized, self._scales = quantize(data, signed=self._signed, sqrt=self._sqrt, softsign=self._softsign)
