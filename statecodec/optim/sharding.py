"""Parameters that are DTensors (FSDP2, tensor parallelism): a rank keeps and steps its own part of every state.

Every part of a state is placed as the parameter is. Groups and blocks of a state lie within rows, and dimension 0 is
cut between rows, so the parts of all ranks together are the parts of the whole. Where a cut falls inside a row it must
fall between groups, or the state stays exact (`fits_between_cuts`). Only this module knows DTensors; everything else
works on `local` tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from statecodec import dtypes
from statecodec.codecs import Codec, EncodedTensor, LowRank, Shared
from statecodec.errors import OptimizerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Shape: TypeAlias = tuple[int, ...]


def is_dtensor(x: object) -> bool:
    """Whether a tensor is a DTensor; imports nothing, because where there is one torch's module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():  # autograd must not record this
        return cast("DTensor", x).to_local()


def place_of(x: Tensor) -> Hashable:
    """Mesh and placements of a DTensor, None for other tensors."""
    return (cast("DTensor", x).device_mesh, cast("DTensor", x).placements) if is_dtensor(x) else None


def mesh_of(x: Tensor) -> DeviceMesh:
    """The mesh of a DTensor."""
    return cast("DTensor", x).device_mesh


def check_placements(p: Tensor) -> None:
    """Raise OptimizerError for a parameter whose shards are not slices of it."""
    if is_dtensor(p) and any(placement.is_partial() for placement in cast("DTensor", p).placements):
        raise OptimizerError(f"a parameter is placed as {cast('DTensor', p).placements}: only a sum of shards gives it")


def gradient(p: Tensor, grad: Tensor) -> Tensor:
    """What this rank holds of a gradient, placed as the parameter is."""
    if is_dtensor(grad) and cast("DTensor", grad).placements != cast("DTensor", p).placements:
        grad = cast("DTensor", grad).redistribute(placements=cast("DTensor", p).placements)
    return local(grad)


# --- where parameters are cut


def _sharded_dims(p: Tensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of every sharding of a DTensor; dimensions of one rank are left out."""
    d = cast("DTensor", p)
    shards = [(i, cast(Any, s).dim) for i, s in enumerate(d.placements) if not s.is_replicate()]
    return [(i, dim % max(p.ndim, 1)) for i, dim in shards if d.device_mesh.size(i) > 1]


def is_cut(p: Tensor) -> bool:
    """Whether other ranks hold other elements of a parameter."""
    return is_dtensor(p) and bool(_sharded_dims(p))


def cut_times(p: Tensor) -> int:
    """Along how many dimensions of the mesh a parameter is cut."""
    return len(_sharded_dims(p)) if is_dtensor(p) else 0


def cut_group(p: Tensor) -> ProcessGroup:
    """The ranks that hold the pieces of a parameter that one dimension of the mesh cuts."""
    ((at, _),) = _sharded_dims(p)
    return cast("DTensor", p).device_mesh.get_group(at)


def cut_dim(x: Tensor, p: Tensor) -> int | None:
    """Along which dimension a stored part of such a parameter is cut; None if every rank holds all of it."""
    ((at, _),) = _sharded_dims(p)
    placement = cast("DTensor", x).placements[at]
    return None if placement.is_replicate() else int(cast(Any, placement).dim) % max(x.ndim, 1)


def row_cut(p: Tensor) -> int | None:
    """At multiples of how many elements the rows of a parameter are cut; None if no row is.

    1 where the cuts are uneven, where they interleave (dimensions from 2 on), and for vectors, whose cuts would be
    elsewhere on another number of ranks.
    """
    if not is_dtensor(p) or p.ndim == 0:
        return None
    if p.ndim == 1:
        return None if all(s.is_replicate() for s in cast("DTensor", p).placements) else 1
    inner = [(i, dim) for i, dim in _sharded_dims(p) if dim > 0]
    if not inner:
        return None
    pieces = math.prod(cast("DTensor", p).device_mesh.size(i) for i, _ in inner)
    even = all(dim == 1 for _, dim in inner) and p.shape[1] % pieces == 0
    return p.shape[1] // pieces * math.prod(p.shape[2:]) if even else 1


def fits_between_cuts(codec: Codec, p: Tensor, shape: Shape) -> bool:
    """Whether a state of this shape can be stored shard by shard as it would be stored whole."""
    cut = row_cut(p)
    align = codec.align(shape)
    return cut is None or (align is not None and cut % align == 0)


def groups_across(p: Tensor, dims: Sequence[int]) -> tuple[ProcessGroup, ...]:
    """The process groups whose ranks hold parts of these dimensions."""
    if not is_dtensor(p):
        return ()
    return tuple(cast("DTensor", p).device_mesh.get_group(i) for i, dim in _sharded_dims(p) if dim in dims)


def first_element(p: Tensor) -> int:
    """The position of this rank's first element in the flattened parameter.

    Where rows are cut, it is a number that no other shard's elements reach.
    """
    if not is_dtensor(p) or p.ndim == 0:
        return 0
    (chunk,) = cast(Any, p).__create_chunk_list__()
    if not p.numel() or not math.prod(chunk.sizes):
        return 0
    cut = [d for d in range(1, p.ndim) if chunk.sizes[d] != p.shape[d]]
    if not cut:
        return int(chunk.offsets[0]) * math.prod(p.shape[1:])
    before = sum(chunk.offsets[d] * math.prod(p.shape[:d]) * math.prod(p.shape[d + 1 :]) for d in cut)
    return int(before + chunk.offsets[0] * math.prod(chunk.sizes[1:]))


def places(p: Tensor) -> Tensor:
    """int64, where in the flattened parameter each element is that this rank holds, in the shape of what it holds."""
    own, begins = local(p), (0,) * p.ndim
    if is_dtensor(p):
        (chunk,) = cast(Any, p).__create_chunk_list__()
        begins = tuple(chunk.offsets)
    found = torch.zeros((1,) * p.ndim, dtype=torch.int64, device=own.device)
    for d, (begin, n) in enumerate(zip(begins, own.shape, strict=True)):
        along = torch.arange(begin, begin + n, device=own.device) * math.prod(p.shape[d + 1 :])
        found = found + along.view(-1, *(1,) * (p.ndim - d - 1))
    return found


# --- states


def local_shape(p: Tensor, shape: Shape) -> Shape:
    """The shape of this rank's part of a state, which has the parameter's shape or that of its matrix."""
    shard = tuple(local(p).shape)
    return shard if shape == tuple(p.shape) else (shard[0], math.prod(shard[1:]))


def zeros(codec: Codec, shape: Shape, dtype: torch.dtype, p: Tensor) -> EncodedTensor:
    """A state of zeros of a parameter, placed as the parameter is."""
    if not is_dtensor(p):
        return codec.zeros(shape, dtype, p.device)
    local_parts = codec.parts(local_shape(p, shape), dtypes.of(dtype))
    parts, device = {}, local(p).device
    for k, spec in codec.parts(shape, dtypes.of(dtype)).items():
        placements = _placements(codec, spec.shape, p)
        cut = {s.dim for s in placements if not s.is_replicate()}
        size = tuple(local_parts[k].shape[d] if d in cut else n for d, n in enumerate(spec.shape))
        parts[k] = _wrap(torch.zeros(size, dtype=spec.dtype.torch, device=device), spec.shape, p, placements)
    return EncodedTensor(codec, shape, dtype, parts)


def own_part(state: EncodedTensor, p: Tensor) -> EncodedTensor:
    """What this rank holds of a state, as an encoded tensor of its own; shares memory."""
    if not is_dtensor(p):
        return state
    shape = local_shape(p, state.shape)
    if isinstance(state.codec, Shared):  # an empty shard holds the shared mean too
        shape = tuple(max(n, 1) if d in state.codec.dims else n for d, n in enumerate(shape))
    return EncodedTensor(state.codec, shape, state.dtype, {k: local(t) for k, t in state.parts.items()})


def is_placed(state: EncodedTensor, p: Tensor) -> bool:
    """Whether every part of a state is where the parameter wants it."""
    if not is_dtensor(p):
        return state.device == p.device and not any(map(is_dtensor, state.parts.values()))
    mesh, device = cast("DTensor", p).device_mesh, local(p).device
    return all(
        place_of(part) == (mesh, _placements(state.codec, tuple(part.shape), p)) and local(part).device == device
        for part in state.parts.values()
    )


def placed(codec: Codec, part: Tensor, p: Tensor) -> Tensor:
    """A copy of a whole or otherwise placed part of a state, placed as the parameter wants it."""
    if not is_dtensor(p):
        return whole(part).detach().to(p.device, copy=True).contiguous()
    shape = tuple(part.shape)
    placements, device = _placements(codec, shape, p), local(p).device
    if place_of(part) == (cast("DTensor", p).device_mesh, placements):
        shard = local(part)
    else:
        target = _wrap(torch.empty(0, dtype=torch.float32, device="meta"), shape, p, placements)
        shard = _slice(whole(part).detach(), target)
    return _wrap(shard.to(device, copy=True).contiguous(), shape, p, placements)


def sliced(x: Tensor, p: Tensor) -> Tensor:
    """What this rank holds of a whole tensor (or DTensor) of a parameter's size; a view if it can be.

    It has the shape of what this rank holds of the parameter.
    """
    if not is_dtensor(p):
        return whole(x)
    if place_of(x) == place_of(p):
        return local(x)
    return _slice(whole(x).view(p.shape), p)


def joined(shard: Tensor, p: Tensor) -> Tensor:
    """The tensor of the parameter's shape of which every rank holds `own`, placed as the parameter is."""
    if not is_dtensor(p):
        return shard
    return _wrap(shard.view(local(p).shape), tuple(p.shape), p, cast("DTensor", p).placements)


def whole(x: Tensor) -> Tensor:
    """All of a tensor; for a DTensor every rank must call it."""
    if not is_dtensor(x):
        return x
    if x.dtype != torch.int16:
        return cast("DTensor", x).full_tensor()
    shard = local(x).contiguous().unsqueeze(-1).view(torch.uint8)  # neither gloo nor NCCL moves 16-bit integers
    return whole(_wrap(shard, (*x.shape, 2), x, cast("DTensor", x).placements)).view(torch.int16).squeeze(-1)


def encode(codec: Codec, shard: Tensor, shape: Shape, p: Tensor) -> EncodedTensor:
    """Encode a state of which every rank holds `own`. Codecs that see the whole tensor gather it first."""
    if not is_dtensor(p):
        return codec.encode(shard.reshape(shape))
    if codec.align(shape) is None:
        gathered = codec.encode(whole(joined(shard.contiguous(), p)).reshape(shape))
        return EncodedTensor(codec, shape, shard.dtype, {k: placed(codec, t, p) for k, t in gathered.parts.items()})
    encoded = codec.encode(shard.reshape(local_shape(p, shape)))
    specs = codec.parts(shape, dtypes.of(shard.dtype))
    parts = {k: _wrap(t, specs[k].shape, p, _placements(codec, specs[k].shape, p)) for k, t in encoded.parts.items()}
    return EncodedTensor(codec, shape, shard.dtype, parts)


def decode(state: EncodedTensor, p: Tensor) -> Tensor:
    """What this rank holds of the parameter, of a decoded state."""
    if not is_dtensor(p):
        parts = {k: whole(t) for k, t in state.parts.items()}
        return EncodedTensor(state.codec, state.shape, state.dtype, parts).decode().view(p.shape)
    shard = local(p)
    if state.codec.align(state.shape) is not None and is_placed(state, p):
        return own_part(state, p).decode().view(shard.shape)
    parts = {k: whole(t) for k, t in state.parts.items()}
    full = EncodedTensor(state.codec, state.shape, state.dtype, parts).decode()
    return sliced(full, p).contiguous()


def _placements(codec: Codec, part: Shape, p: Tensor) -> tuple[Any, ...]:
    """Where a part of a state goes: as the parameter, but whole along what the part shares or does not have."""
    from torch.distributed.tensor import Replicate

    def follows(placement: Any) -> bool:
        dim = placement.dim % max(p.ndim, 1)
        return not isinstance(codec, LowRank) and dim < len(part) and not (part[dim] == 1 < p.shape[dim])

    placements = cast("DTensor", p).placements
    return tuple(s if s.is_replicate() or follows(s) else Replicate() for s in placements)


def _wrap(shard: Tensor, shape: Shape, p: Tensor, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    mesh = cast("DTensor", p).device_mesh
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _slice(full: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, cut as a DTensor of the same shape is."""
    (chunk,) = cast(Any, like).__create_chunk_list__()
    return full[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))]
