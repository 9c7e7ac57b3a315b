"""The seam between the optimizers and a fused step: what one launch per parameter group is given.

`statecodec.optim` always has a generic path (decode a chunk, `reference.steps` / `cpu.steps`, encode it back) and that
path is the definition. A backend that can do a whole parameter group at once offers, in its
package (`statecodec.kernels.triton`),

    supports(method, formats, param, low) -> bool     # may this combination be fused? (no tensors)
    step(method, slots, formats, hyper) -> None       # do it, in place, for every slot

and the optimizer calls it with the slots of one group that share method, formats and dtypes. Contract of `step`:

* Per slot: if any element of `grad` is NaN or beyond LARGEST_GRADIENT in magnitude (infinities are), nothing of that
  slot changes except `skipped += 1`. Otherwise `step += 1` and the arithmetic of `reference.steps.<method>` is applied
  to decoded fp32 values, with t = the incremented step; results are encoded by the arithmetic of the codec kernels
  (same codes and scales as `encode_companded`, same bits as `encode_split`).
* `step` and `skipped` are read and written on their device, never on the host: a step is CUDA-graph capturable when
  `lr` is a tensor. The bias corrections 1 - beta**t need 1e-6 relative accuracy (expm1 of t * log(beta), with log(beta)
  computed on the host).
* `grad` has any strides and dtype fp32, bf16 or fp16; `param` and every part are contiguous. Sizes may exceed 2**31
  elements.
* `formats[state]` is that state's codec config (`Codec.config()`: raw, companded, folded with an inner codec, shared
  with dims and an inner codec); `slot.states[state]` are the parts under the codec's part names. Rows and groups:
  `codecs.base`.
* `low is None`: `param` is stepped in its own dtype (fp32 in place; bf16 / fp16 widened, stepped, rounded to nearest
  even, or stochastically). Otherwise param and low are the two parts of a split: decode, step, encode.
* `hyper.stochastic`: before the weight is split (or rounded to bf16), the bits that the stored form drops are dithered
  by `reference.steps.dither`; the random number of an element depends on (seed, slot.index, t, element) only, so every
  backend, chunking and resume draws the same ones.
* `hyper.maximize` negates the gradient first; then `hyper.l2` adds l2 * weight to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Gradients beyond this are treated like infinite ones: their squares, summed over a tensor, would leave fp32's range.
LARGEST_GRADIENT = 2.0**48


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter of a launch. `states`: state name -> part name -> tensor. All tensors are updated in place."""

    param: Tensor
    grad: Tensor
    step: Tensor  # 0-d fp32: steps done so far
    skipped: Tensor  # 0-d fp32: steps skipped because the gradient was not finite
    low: Tensor | None  # int8 or int16, same shape as param; None without master weights
    states: Mapping[str, Mapping[str, Tensor]]
    index: int  # position of the parameter in the optimizer; seeds the dither
    shape: tuple[int, ...]  # as the states see the parameter (trailing dimensions may be flattened)


@dataclass(frozen=True, slots=True)
class Hyper:
    """The scalars of one parameter group. Fields that a method does not know are ignored by it."""

    lr: float | Tensor
    beta1: float = 0.9  # adam, foam, slim, lion
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # decoupled weight decay: weights are multiplied by 1 - lr * decay before the step
    l2: float = 0.0  # weight decay through the gradient
    maximize: bool = False
    momentum: float = 0.0  # sgd
    dampening: float = 0.0
    nesterov: bool = False
    scale: float = 1.0  # foam: alpha
    residual: float = 1.0  # foam: rho_r
    mean_of_squares: bool = True  # foam: fold g*g (True) or square the folded g (False)
    true_tail: bool = True  # foam: a short tail block divides by its own length
    torch_bias: bool = True  # foam: eps is added to sqrt(v_hat) (True) or to sqrt(v) (False, as published)
    decay_first: bool = True  # foam: decay before the step (True) or after it, on the new weight (False, as published)
    stochastic: bool = False
    seed: int = 0


class FusedStep(Protocol):
    """What a backend package has when it can step whole groups."""

    def supports(
        self, method: str, formats: Mapping[str, dict[str, Any]], param: torch.dtype, low: torch.dtype | None
    ) -> bool: ...

    def step(self, method: str, slots: Sequence[Slot], formats: Mapping[str, dict[str, Any]], hyper: Hyper) -> None: ...
