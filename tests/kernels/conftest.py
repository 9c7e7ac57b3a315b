"""Where the Triton kernels run in this process: on a GPU if there is one, else in Triton's interpreter on the CPU.

The choice is made once, before anything imports triton. Tests take the `device` fixture and so exist twice:
`interpreter`, and `gpu`, which is skipped where there is no CUDA device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

SENTINEL = 0x5A

if not CUDA:
    from triton.runtime.interpreter import InterpretedFunction

    from tests.kernels.ptx import assembly

    assembly.install()
    _plain_call, _patched = InterpretedFunction.__call__, set[str]()

    def _call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        """Call a device function without patching Triton's language anew, which takes seconds a tile.

        A launch has done it for our modules, and for each of Triton's own once is enough.
        """
        module = self.fn.__module__
        if module.startswith("triton.") and module not in _patched:
            _patched.add(module)
            return _plain_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = _call


@pytest.fixture
def interpreter() -> None:
    """Needs Triton's interpreter, and one whose results count."""
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):
        pytest.skip("needs triton 3.9: earlier interpreters round a fused multiply-add twice")


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors the Triton kernels take in this process."""
    if (request.param == "cuda") != CUDA:
        pytest.skip("needs a CUDA device" if request.param == "cuda" else "this process compiles for the GPU")
    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    return torch.device(request.param)


class Guarded:
    """Output tensors between sentinel bytes, filled with NaN or other nonsense.

    What a kernel leaves out or overruns shows.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._buffers = device, list[tuple[Tensor, int, int]]()

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((nbytes + 128,), SENTINEL, dtype=torch.uint8, device=self._device)
        buffer[64 : 64 + nbytes] = 0xFF  # NaN in every float type, -1 in every integer type
        self._buffers.append((buffer, 64, nbytes))
        return buffer[64 : 64 + nbytes].view(dtype).view(shape)

    def check(self) -> None:
        for buffer, begin, nbytes in self._buffers:
            edges = torch.cat((buffer[:begin], buffer[begin + nbytes :]))
            assert bool((edges == SENTINEL).all()), "a kernel wrote outside its output"


@pytest.fixture
def guarded(device: torch.device) -> Guarded:
    """An allocator of guarded outputs; call `check()` at the end."""
    return Guarded(device)


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors are equal bit by bit (NaN equals itself, -0.0 is not 0.0)."""

    def same(a: Tensor, b: Tensor) -> bool:
        a, b = a.cpu().contiguous(), b.cpu().contiguous()
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))

    return same


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
