"""A model in bf16 or fp16, with the layers that need it left in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from statecodec.errors import OptimizerError
from statecodec.names import bare_name

# Running statistics are small changes added to a large sum: bf16 would round them away. (LayerNorm and RMSNorm have
# none, and torch computes them in fp32 whatever their weights are.)
_RUNNING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def cast_model(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    selective: bool = True,
    full_precision_layers: Sequence[str | nn.Module] = (),
    full_precision_recast_layers: Sequence[str | nn.Module] = (),
) -> list[str]:
    """Cast a model's parameters and floating-point buffers in place, and leave some layers in fp32.

    Layers that stay in fp32 get their inputs in fp32. The parameters stay the same objects, tied ones stay tied, and a
    tensor that any fp32 layer holds is fp32. The signature is that of FlashOptim's function of this name.

    Casting rounds the weights. An optimizer with master weights can hold what is rounded away:

        exact = {name: value.float().clone() for name, value in model.state_dict().items()}
        cast_model(model)
        optimizer = AdamW(model.named_parameters())
        load_fp32_state_dict(model, optimizer, exact)

    Args:
        model: The model.
        dtype: torch.bfloat16 or torch.float16.
        selective: Leave batch and instance norms in fp32, whose running statistics need it; their output is cast back.
        full_precision_layers: Layers to leave in fp32 with fp32 output, such as a head: the modules themselves, or
            shell patterns on their full names (`lm_head`, `*.head`).
        full_precision_recast_layers: The same, with output cast back to `dtype`, for layers in the middle.

    Returns:
        The names of the parameters and buffers that are fp32.

    Raises:
        OptimizerError: For another dtype, and for a layer that the model does not have; the model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> cast_model(model, full_precision_layers=["2"])
        ['1.weight', '1.bias', '1.running_mean', '1.running_var', '2.weight', '2.bias']
        >>> model(torch.ones(3, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    if dtype not in _HALF:
        raise OptimizerError(f"cast_model casts to bf16 or fp16, found {dtype}")
    kept = dict.fromkeys(_selected(model, full_precision_recast_layers), True)
    if selective:
        kept |= {m: True for m in model.modules() if isinstance(m, _RUNNING)}
    kept |= dict.fromkeys(_selected(model, full_precision_layers), False)
    exact = {id(t) for module in kept for t in _tensors(module)}
    inside = {id(inner) for outer in kept for inner in outer.modules()}
    for module in model.modules():  # layers that share one of those tensors, such as the embedding of a tied head
        if id(module) not in inside and any(id(t) in exact for t in _tensors(module, recurse=False)):
            kept[module] = True
    _cast(model, dtype, exact)
    for module, recast in ((called, recast) for layer, recast in kept.items() for called in _called(layer)):
        module.register_forward_pre_hook(_widen, with_kwargs=True)
        if recast:
            module.register_forward_hook(partial(_narrow, dtype=dtype))
    named = (*model.named_parameters(), *model.named_buffers())
    fp32 = {name for name, t in named if t.dtype == torch.float32}
    return [name for name in model.state_dict(keep_vars=True) if name in fp32]


def _selected(model: nn.Module, layers: Sequence[str | nn.Module]) -> Iterator[nn.Module]:
    """The modules that are meant. Raises OptimizerError for one that is not there."""
    modules = {bare_name(f"{name}.").removesuffix("."): module for name, module in model.named_modules()}
    for layer in layers:
        if isinstance(layer, nn.Module):
            hits = [module for module in modules.values() if module is layer]
        else:
            hits = [module for name, module in modules.items() if fnmatchcase(name, layer)]
        if not hits:
            wanted = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
            names = ", ".join(name for name in list(modules)[:6] if name)
            raise OptimizerError(f"no layer of the model is {wanted}; patterns match full names, such as {names}")
        yield from hits


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or the modules inside one that only contains others: a ModuleDict is never called itself."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _called(child)


def _cast(model: nn.Module, dtype: torch.dtype, exact: set[int]) -> None:
    """Cast every floating-point tensor; parameters that are views of one memory stay so."""
    done: dict[tuple[Any, ...], Tensor] = {}
    for tensor in _tensors(model):
        wanted = torch.float32 if id(tensor) in exact else dtype
        if not tensor.is_floating_point() or tensor.dtype == wanted:
            continue
        memory = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), wanted
        if not tensor.numel() or memory not in done:
            done[memory] = tensor.detach().to(wanted)
        grad, tensor.grad = tensor.grad, None
        tensor.data = done[memory]
        tensor.grad = None if grad is None else grad.to(wanted)


def _widen(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in _HALF else t, (args, kwargs))


def _narrow(_: nn.Module, __: Any, output: Any, *, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, output)
