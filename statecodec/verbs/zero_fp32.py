"""The fp32 state dict of a ZeRO checkpoint, as DeepSpeed's zero_to_fp32.py makes it, one parameter at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec.checkpoint.base import Checkpoint
from statecodec.checkpoint.open import loaded, open_checkpoint
from statecodec.checkpoint.spill import Spill
from statecodec.errors import UsageError
from statecodec.layouts import Run
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MODEL = "_model_states.pt"


def zero_fp32(src: Path, spill: Spill) -> dict[str, Tensor]:
    """Masters, frozen parameters and buffers in fp32, and further names of shared parameters; large ones in the spill.

    Of several steps in one directory it takes the one that the file `latest` names. Raises UsageError, LayoutError,
    FormatError.
    """
    with open_checkpoint(src) as checkpoint:
        if "DeepSpeed ZeRO-" not in str(checkpoint.report().source.get("framework")):
            raise UsageError(f"{src} is no checkpoint of DeepSpeed's ZeRO; zero-fp32 is made of its directory")
        folder, files = _step(src, loaded(checkpoint, torch.device("meta")))
        models = sorted(name for name in files if name.endswith(_MODEL))
        if len({name.partition("mp_rank_")[2] for name in models}) > 1:
            raise UsageError(
                f"{src}: model-parallel ranks hold parts of the parameters, which only the program can join"
            )
        model, prefix = files[models[0]], f"{folder}:" if folder else ""
        module, shared = _of(model, "module", dict), _of(model, "shared_params", dict)
        path = f"{folder}/{models[0]}" if folder else models[0]
        weights = {
            name: checkpoint.read(f"{path}:module.{name}").float()
            for name in _of(model, "buffer_names", list)
            if name in module
        }
        for param, name in _parameters(checkpoint, prefix).items():
            weights[param] = _in_fp32(checkpoint, name, spill)
    weights.update({name: weights[held] for name, held in shared.items() if held in weights})
    order = {name: i for i, name in enumerate(module)}
    return {name: weights[name] for name in sorted(weights, key=lambda name: order.get(name, len(order)))}


def _in_fp32(checkpoint: Checkpoint, name: str, spill: Spill) -> Tensor:
    """A tensor, put together in the spill from the pieces that the ranks hold."""
    whole = checkpoint.joined.get(name)
    if whole is None or not all(isinstance(part, Run) for _, part in whole.pieces):
        return spill.keep(checkpoint.read(name).float())
    values = spill.take(4 * math.prod(whole.shape)).view(torch.float32)
    for index, part in whole.pieces:
        assert isinstance(part, Run)
        at = part.start
        for piece in checkpoint.stream(checkpoint.items[index]):
            piece = piece.view(torch.uint8).view(whole.dtype.torch)
            values[at : at + piece.numel()] = piece
            at += piece.numel()
            spill.used(4 * piece.numel())
    return values.view(whole.shape)


def _of(model: Any, key: str, kind: type) -> Any:
    """A value of a dict; an empty one where it is of another kind than expected."""
    value = model.get(key) if isinstance(model, dict) else None
    return value if isinstance(value, kind) else kind()


def _step(src: Path, tree: Any) -> tuple[str, dict[str, Any]]:
    """The folder of one step and its files' contents."""
    if _is_step(tree):
        return "", tree
    by_step = {name: files for name, files in tree.items() if _is_step(files)} if isinstance(tree, dict) else {}
    latest = _of(tree, "latest", bytes)
    named = latest.decode(errors="replace").strip()
    if named not in by_step and len(by_step) != 1:
        raise UsageError(
            f"{src} holds {len(by_step)} checkpoints, none of which `latest` names; give one of its folders"
        )
    folder = named if named in by_step else next(iter(by_step))
    return folder, by_step[folder]


def _is_step(files: Any) -> bool:
    return isinstance(files, dict) and any(str(name).endswith(_MODEL) for name in files)


def _parameters(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    """Parameter -> name of its master; of a frozen one, of its weight."""
    joined = {index: name for name, tensor in checkpoint.joined.items() for index, _ in tensor.pieces}
    by_role: dict[str, dict[str, str]] = {"weight": {}, "master": {}}
    for item in checkpoint.items:
        name = joined.get(item.index, item.name)
        if item.role in by_role and item.param is not None and name.startswith(prefix):
            by_role[item.role].setdefault(item.param, name)
    return by_role["weight"] | by_role["master"]
