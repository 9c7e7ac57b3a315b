"""What sharing second moments does to the Adam update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from statecodec import kernels
from statecodec.checkpoint.base import Checkpoint, Elements, TensorInfo
from statecodec.choose.snr import Dims, slabs
from statecodec.choose.step_size import update_settings
from statecodec.kernels.reference.statistics import NO_UPDATE, UpdateComparison
from statecodec.layouts import Moments
from statecodec.lazy import torch
from statecodec.parallel import ordered_map
from statecodec.progress import Meter, Progress

if TYPE_CHECKING:
    from torch import Tensor


def update_errors(
    checkpoint: Checkpoint,
    choices: Mapping[str, Mapping[str, Dims]],
    threads: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """How far the Adam update is off when second moments are shared.

    Args:
        checkpoint: Where both moments are read, streamed.
        choices: Name of a choice -> parameter (without one, the second moment's own name) -> the dimensions that its
            second moment shares.
        threads: Number of threads.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        By the choice's name ||u' - u|| / ||u|| over all parameters, of u = m_hat / (sqrt(v_hat) + eps); u' divides by
        the mean over the shared dimensions. Empty where the checkpoint has no pairs of moments.
    """
    with_values = [m for m in checkpoint.moments if math.prod(checkpoint.tensors[m.exp_avg].shape)]
    meter = Meter(progress, sum(checkpoint.tensors[m.exp_avg].nbytes * 2 for m in with_values), "measuring updates")

    def compare(m: Moments) -> tuple[str, dict[Dims, UpdateComparison]]:
        second = checkpoint.tensors[m.exp_avg_sq]
        name = second.param or second.name
        comparisons = _compared(checkpoint, m, {shared_dims.get(name, ()) for shared_dims in choices.values()})
        meter.add(2 * second.nbytes)
        return name, comparisons

    totals = dict.fromkeys(choices, NO_UPDATE)
    with ordered_map(compare, with_values, threads) as compared:
        for name, comparisons in compared:
            for choice, shared_dims in choices.items():
                totals[choice] = totals[choice].merged(comparisons[shared_dims.get(name, ())])
    return {name: math.sqrt(t.sum_sq_diff / t.sum_sq) for name, t in totals.items() if t.sum_sq}


def _compared(checkpoint: Checkpoint, m: Moments, every: Iterable[Dims]) -> dict[Dims, UpdateComparison]:
    """One parameter's update under each set of dimensions."""
    second = checkpoint.tensors[m.exp_avg_sq]
    shape = second.shape or (1,)
    totals = dict.fromkeys(every, NO_UPDATE)
    means = {dims: _mean(checkpoint, second, dims) for dims in totals if 0 in dims}
    numerators = Elements(checkpoint.stream(checkpoint.tensors[m.exp_avg]))
    divisors = Elements(checkpoint.stream(second))
    for start, stop in slabs(shape):
        count = (stop - start) * math.prod(shape[1:])
        first, v = (elements.take(count).to(torch.float32) for elements in (numerators, divisors))
        block = v.view(stop - start, *shape[1:])
        for dims, total in totals.items():
            shared = v
            if dims:
                mean = means[dims] if dims in means else block.mean(dims, keepdim=True, dtype=torch.float64)
                shared = mean.to(torch.float32).expand(block.shape).reshape(-1)
            comparison = kernels.host().compare_updates(first, v, first, shared, **update_settings(m))
            totals[dims] = total.merged(comparison)
    return totals


def _mean(checkpoint: Checkpoint, tensor: TensorInfo, dims: Dims) -> Tensor:
    """The mean over dimensions of which the first is one, in float64."""
    shape, elements = tensor.shape, Elements(checkpoint.stream(tensor))
    total: Tensor | float = 0.0
    for start, stop in slabs(shape):
        block = elements.take((stop - start) * math.prod(shape[1:])).view(stop - start, *shape[1:])
        total = total + block.sum(dims, keepdim=True, dtype=torch.float64)
    assert not isinstance(total, float)  # only tensors that have elements are compared
    return total / math.prod(shape[d] for d in dims)
