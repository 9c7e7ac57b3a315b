"""Reading the options that every optimizer shares: how moments are stored, what may be encoded, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from statecodec import kernels
from statecodec.codecs import Cast, Codec, Companded, Raw, Split, format_codec, parse
from statecodec.errors import BackendUnavailable, CodecError, OptimizerError
from statecodec.optim import sharding
from statecodec.optim.method import Group

# Second moments: never negative, and a stored zero must be an exact zero. Everything else is a first moment.
SECOND_MOMENTS = ("exp_avg_sq",)

# Groups of 32, as in FlashOptim. A live second moment compands by the square root: near the top its codes are close
# enough for an average with beta2 = 0.999 to move. Logarithmic codes are 4 % apart everywhere: it would stand still.
PRESETS: dict[str, tuple[Codec, Codec]] = {
    "dense": (Raw(), Raw()),
    "companded8": (Companded("softsign", 8, 32), Companded("sqrt", 8, 32)),
}


class Options(TypedDict, total=False):
    """Keyword options that every optimizer takes. StateOptimizer says what they mean."""

    moments: object
    master_weights: str | None
    stochastic_rounding: bool
    decouple_lr: bool
    maximize: bool
    dense_below: int
    seed: int
    matrix: bool | None
    backend: str | None
    fused: bool | None


COMMON: dict[str, Any] = {
    "moments": "companded8", "master_weights": "split24", "stochastic_rounding": False, "decouple_lr": False,
    "maximize": False, "dense_below": 4096, "seed": 0, "matrix": None, "backend": None, "fused": None,
}  # fmt: skip


def moment_codec(moments: str | Mapping[str, str], state: str) -> Codec:
    """The codec that a group's `moments` option gives one state. Raises OptimizerError."""
    if isinstance(moments, str) and moments in PRESETS:
        return PRESETS[moments][state in SECOND_MOMENTS]
    text = moments if isinstance(moments, str) else moments.get(state)
    if text is None:
        raise OptimizerError(f"moments={dict(moments)!r} says nothing about {state}; name a codec for it, or raw")  # type: ignore[arg-type]
    try:
        codec = parse(text)
    except CodecError as error:
        names = ", ".join(PRESETS)
        raise OptimizerError(f"moments={text!r} for {state} is neither {names} nor a codec: {error}") from error
    if not isinstance(codec, Raw | Cast | Companded | Split):
        raise OptimizerError(
            f"moments={text!r}: a live {state} is raw, cast, split or companded; folded states are FOAM's, shared ones "
            "SlimAdam's, low-rank ones LoRAPre's"
        )
    if isinstance(codec, Companded) and codec.signed == (state in SECOND_MOMENTS):
        fit = "sqrt or log" if state in SECOND_MOMENTS else "softsign or linear"
        raise OptimizerError(f"moments={text!r}: {state} needs a curve of {fit}")
    return codec


def plain_moments(moments: object) -> str | dict[str, str]:
    """The `moments` option as it stands in a param group: text, or text by state name. Raises OptimizerError."""
    if isinstance(moments, Codec):
        return format_codec(moments)
    if isinstance(moments, str):
        return moments
    if isinstance(moments, Mapping):
        return {str(k): format_codec(v) if isinstance(v, Codec) else str(v) for k, v in moments.items()}
    raise OptimizerError(f"moments={moments!r}: expected {', '.join(PRESETS)}, a codec, or codecs by state")


def stored_codec(param: Tensor, group: Group, state: str) -> Codec:
    """The codec of one full-size state of this parameter.

    Small and fp64 states stay exact, and those whose shards end inside a group.
    """
    codec = moment_codec(group["moments"], state)
    exact = param.numel() < group["dense_below"] or param.dtype == torch.float64
    return Raw() if exact or not sharding.fits_between_cuts(codec, param, tuple(param.shape)) else codec


def number(value: object) -> object:
    """The Python number in a numpy number or in a tensor or array of one element; anything else as it is."""
    is_single = isinstance(value, np.generic) or (
        isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1
    )
    return value.item() if is_single else value  # type: ignore[attr-defined]


def without_numpy(value: Any) -> Any:
    """A group's option with Python numbers for numpy's, which torch.load(weights_only=True) would refuse.

    Tensors stay: a learning rate may be one.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(without_numpy, value)) if type(value) in (list, tuple) else value
    return number(value) if isinstance(value, np.generic | np.ndarray) else value


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_top: bool = False) -> None:
    """Raise OptimizerError unless low <= value <= high (< high if `open_top`)."""
    plain = number(value)
    ok = isinstance(plain, int | float) and low <= plain <= high and not (open_top and plain == high)
    if not ok:
        top = "" if high == math.inf else f" and {'<' if open_top else '<='} {high}"
        raise OptimizerError(f"{name}={_shown(value)}, expected a number >= {low}{top}")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Raise OptimizerError unless it is an integer in low..high."""
    if type(value) is not int or not low <= value <= high:
        raise OptimizerError(f"{name}={_shown(value)}, expected an integer from {low} to {high}")


def check_flags(group: Group, *names: str) -> None:
    """Raise OptimizerError unless these options are True or False."""
    for name in names:
        if type(group[name]) is not bool:
            raise OptimizerError(f"{name}={_shown(group[name])}, expected True or False")


def check_betas(group: Group, *, open_top: bool) -> None:
    """Raise OptimizerError unless `betas` is two numbers from 0 to 1 (below 1 if `open_top`)."""
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise OptimizerError(f"betas={_shown(betas)}, expected two numbers")
    for at, beta in enumerate(betas):
        check_number(f"betas[{at}]", beta, 0, 1, open_top=open_top)


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Raise OptimizerError unless it is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise OptimizerError(f"{name}={_shown(value)}, expected one of {', '.join(map(str, choices))}")


def _shown(value: object) -> str:
    return repr(value)[:80]


def check_param(param: Tensor) -> None:
    """Raise OptimizerError for what no optimizer here can step."""
    sharding.check_placements(param)
    if param.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise OptimizerError(f"parameters are fp32, bf16, fp16 or fp64, found {param.dtype} {tuple(param.shape)}")
    if param.layout != torch.strided:
        raise OptimizerError(f"parameters are dense (strided) tensors, found {param.layout}")


def check_whole(params: Iterable[Tensor]) -> None:
    """Raise OptimizerError if FSDP1 has flattened and cut the parameters, so that no matrix is left among them.

    It marks every parameter that it manages, also those that NO_SHARD leaves their shapes.
    """
    managed = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    if managed and all(p.ndim == 1 for p in managed):
        raise OptimizerError(
            "the parameters are flattened by FSDP1, so no matrix can be seen in them; use AdamW, Adam, SGD, SGDW or "
            "Lion, which go element by element, or DistributedDataParallel"
        )


def check_fusable(param: Tensor) -> None:
    """Raise OptimizerError for a parameter that fused kernels cannot reach, BackendUnavailable if there are none."""
    kernels.get("triton")
    from statecodec.kernels.triton.runtime import on

    try:
        on(param)
    except BackendUnavailable as error:
        raise OptimizerError(
            f"fused=True, but a parameter is on {param.device}: move the model to a GPU before the optimizer is made, "
            "or leave fused out, which fuses wherever it can"
        ) from error
