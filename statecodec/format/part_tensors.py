"""The tensors of a chunk's parts: made for what is read, compared with what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from statecodec import dtypes
from statecodec.codecs import PartSpec
from statecodec.errors import UsageError
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def empty(specs: Mapping[str, PartSpec]) -> dict[str, Tensor]:
    """New CPU tensors of these shapes and dtypes, with any content."""
    return {name: torch.empty(spec.shape, dtype=spec.dtype.torch, device="cpu") for name, spec in specs.items()}


def matching(parts: Mapping[str, Tensor], specs: Mapping[str, PartSpec], label: str) -> dict[str, Tensor]:
    """The parts in the order of `specs`. Raises UsageError if names, shapes or dtypes are others, or the device is."""
    if parts.keys() != specs.keys() or not all(_is(parts[name], spec) for name, spec in specs.items()):
        found = {name: PartSpec(dtypes.of(part.dtype), tuple(part.shape)) for name, part in parts.items()}
        raise UsageError(f"{label} should have parts {dict(specs)}, found {found}")
    if not all(part.is_cpu for part in parts.values()):
        raise UsageError(f"{label} should have its parts on the CPU: move them there")
    return {name: parts[name] for name in specs}


def _is(part: Tensor, spec: PartSpec) -> bool:
    return part.shape == spec.shape and dtypes.of(part.dtype) is spec.dtype
