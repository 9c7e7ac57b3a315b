"""The seam between the optimizers and a fused step: what one launch per parameter group is given.

`statecodec.optim` always has a generic path (decode a chunk, `reference.steps` / `cpu.steps`, encode it back) and that
path is the definition. A backend that can do a whole parameter group at once offers, in its
package (`statecodec.kernels.triton`),

    supports(method, formats, param, low) -> bool         # may this combination be fused? (no tensors)
    prepare(method, slots, formats) -> Launch             # once; a Launch is called with gradients at every step

Contract of a launch:

* A slot whose gradient is None is left alone. Of all others `step` is counted up, and the arithmetic of
  `reference.steps.<method>` is applied to decoded fp32 values, with t = the incremented step; results are encoded by
  the arithmetic of the codec kernels (same codes and scales as `encode_companded`, same bits as `encode_split`).
* A unit in which any new weight or moment would be NaN, infinite or not below LARGEST (LARGEST_FP16 for an fp16 weight)
  keeps its old bytes, and is added to `skipped`. The unit is what shares a stored number: an element; where a moment is
  companded, its group; where it is folded, a block, or a companded group of blocks. A shared second moment has its own
  say: it keeps its old value, and so do all weights that it stands for.
* `step` and `skipped` are read and written on their device, never on the host: a step is CUDA-graph capturable when
  `lr` is a tensor. The bias corrections 1 - beta**t need 1e-6 relative accuracy.
* A gradient has any strides and dtype fp32, bf16 or fp16; `param` and every part are contiguous. Sizes may exceed 2**31
  elements.
* `formats[state]` says how that state is stored; `slot.states[state]` are the parts under the codec's part names. Rows
  and groups: `codecs.base`.
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
from typing import TYPE_CHECKING, Protocol

from statecodec.kernels.curves import Curve
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# New weights and moments stay below this in magnitude: with a little room above them, every operation of a step is
# exact to the last bit on every backend.
LARGEST = 2.0**64
LARGEST_FP16 = 65520.0  # of an fp16 weight: from here on, it would round to infinity


@dataclass(frozen=True)
class StateStorage:
    """How one state is stored, which its codec says (`Codec.stored`); its bytes depend on nothing else.

    `curve` None: dense fp32 values. Otherwise codes of that curve, with one scale per `group` values of a row. `block`:
    the values are means of that many neighbours (0: they are not folded). `dims`: one value stands for all along these
    dimensions.
    """

    curve: Curve | None = None
    group: int = 0
    block: int = 0
    dims: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter of a launch. `states`: state name -> part name -> tensor. All tensors are updated in place."""

    param: Tensor
    step: Tensor  # 0-d fp32: steps done so far
    skipped: Tensor  # 0-d fp32: units that kept their old bytes so far
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


class Launch(Protocol):
    """A group of slots, prepared: one step each time it is called, with one gradient (or None) per slot."""

    def __call__(self, gradients: Sequence[Tensor | None], hyper: Hyper) -> None: ...


class FusedBackend(Protocol):
    """What a backend package has when it can step whole groups."""

    def supports(
        self, method: str, formats: Mapping[str, StateStorage | None], param: torch.dtype, low: torch.dtype | None
    ) -> bool:
        """Whether steps of this kind can be fused. No tensor is looked at.

        Args:
            method: The method's name.
            formats: How each state is stored, by its name.
            param: The parameter's dtype.
            low: The dtype of the low part of the master weight; None without one.

        Returns:
            True if `prepare` takes them.
        """

    def prepare(self, method: str, slots: Sequence[Slot], formats: Mapping[str, StateStorage | None]) -> Launch:
        """Prepare a launch of one step of these parameters.

        Args:
            method: The method's name.
            slots: The parameters with their states.
            formats: How each state is stored, by its name.

        Returns:
            What is called with gradients at every step.
        """
