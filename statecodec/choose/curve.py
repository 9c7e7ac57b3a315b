"""Size against step error, estimated from the entropy of the codes that a fraction of a step would give.

Samples of every tensor are rounded to the grids that `by_budget` would choose, and their order-0 entropy is what an
entropy coder needs. Of tensors whose codes are predicted by default a chunk is packed. `benchmarks/step_budget.py`
compares the curve with real files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.budget import Budget
from statecodec.choose.choices import Choice, Choices, by_rules
from statecodec.choose.chooser import by_budget
from statecodec.choose.low_rank import is_low_rank
from statecodec.choose.presets import PRESETS
from statecodec.choose.rules import Policy
from statecodec.choose.since_base import packed_size
from statecodec.codecs import Direction, Logarithmic, Split, Uniform
from statecodec.codecs.chunking import Chunk, chunks
from statecodec.errors import UnencodableValues, UsageError
from statecodec.format import Packing
from statecodec.lazy import torch
from statecodec.parallel import default_threads
from statecodec.progress import Meter, Progress

if TYPE_CHECKING:
    from torch import Tensor

Values: TypeAlias = NDArray[np.float64]

_SAMPLE, _PIECE = 1 << 16, 1 << 11  # a larger tensor is sampled by 32 pieces, evenly spread
_FRACTIONS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_GRIDS = (Uniform, Direction, Logarithmic)
_EXACT_BITS = 0.83 * 8  # a byte of fp32 or bf16 numbers, packed without loss; measured in docs/benchmarks.md


@dataclass(frozen=True)
class CurvePoint:
    """The estimated size of a whole checkpoint at errors of its moments and weights, as fractions of one step.

    `label` names a preset. Points of the curve have none, and the same error of both.
    """

    nbytes: int
    bytes_per_param: float
    step_error: float
    weight_step_error: float
    label: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bytes": self.nbytes, "bytes_per_param": self.bytes_per_param, "step_error": self.step_error,
            "weight_step_error": self.weight_step_error, "label": self.label,
        }  # fmt: skip


def measure_curve(src: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> list[CurvePoint]:
    """The curve of one checkpoint, with the presets as labelled points.

    Raises UsageError for a compressed checkpoint, or one in which nothing has an error that is counted in steps.
    """
    with open_checkpoint(src) as source:
        if not isinstance(source, SourceCheckpoint):
            raise UsageError(f"{src} is compressed: its curve would be that of errors already made; give the original")
        named: list[tuple[Budget, str | None]] = [(preset.budget, name) for name, preset in PRESETS.items()]
        budgets = [(Budget(fraction, fraction), None) for fraction in _FRACTIONS] + [(b, n) for b, n in named if b]
        meter = Meter(progress, len(budgets) * source.nbytes, "estimating sizes")
        points, counted = [], False
        for budget, name in budgets:
            choices = by_budget(source, by_rules(source, Policy(()), "lossless"), budget, threads or default_threads())
            counted |= any(isinstance(choice.codec, _GRIDS) for choice in choices.values())
            points.append(_point(source, choices, budget, name))
            meter.add(source.nbytes)
        if not counted:
            raise UsageError(
                f"{src}: no large tensor here has an error that is counted in optimizer steps; such are moments of "
                "Adam and its kin, momenta, and the weights that either trains"
            )
        return points


def _point(source: SourceCheckpoint, choices: Choices, budget: Budget, label: str | None) -> CurvePoint:
    nbytes = sum(_bits(source, item, choices[item.name]) for item in source.items) / 8
    numel = max(source.report().num_params, 1)
    return CurvePoint(round(nbytes), nbytes / numel, budget.moments or 0.0, budget.weights or 0.0, label)


def _bits(source: SourceCheckpoint, item: SourceItem, choice: Choice) -> float:
    """Estimated bits of one tensor under its codec."""
    if is_low_rank(item) and not choice.exact:
        return _packed(source, item, choice)
    codes = _codes(source, item, choice)
    if codes is not None:
        return item.numel * _entropy(codes)
    dropped = 16 - choice.codec.low_bits if isinstance(choice.codec, Split) else 0  # of 32: noise, that packs to itself
    return item.nbytes * _EXACT_BITS - item.numel * dropped


def _packed(source: SourceCheckpoint, item: SourceItem, choice: Choice) -> float:
    """Bits of a tensor if all chunks of its predicted codes pack like the middle one."""
    pieces = chunks(choice.codec, item.shape, item.dtype)
    middle = pieces[len(pieces) // 2]

    def values(of: SourceItem) -> Tensor:
        return source.chunk(of, middle)

    companions = {role: values(_named(source, name)) for role, name in choice.companions.items()}
    try:
        parts = choice.codec.encode(values(item), companions=companions).parts
    except UnencodableValues:
        return item.nbytes * _EXACT_BITS
    return 8.0 * packed_size(parts, Packing("predicted")) * item.numel / (middle.stop - middle.start)


def _named(source: SourceCheckpoint, name: str) -> SourceItem:
    return source.items[source.tensors[name].index]


def _codes(source: SourceCheckpoint, item: SourceItem, choice: Choice) -> Values | None:
    codec = choice.codec
    if isinstance(codec, Uniform):
        rounded: Values = np.rint(_sampled(source, item) / codec.step)
        return rounded
    if isinstance(codec, Direction):
        other = _named(source, choice.companions["exp_avg_sq"])
        root = np.sqrt(np.maximum(_sampled(source, other), 0.0))
        turned: Values = np.rint(_sampled(source, item) / (root + codec.eps) / codec.step)
        return turned
    if isinstance(codec, Logarithmic):
        codes = np.rint(np.log2(np.maximum(_sampled(source, item), 2.0**-149)) * codec.per_octave)
        return _centred(codes, item.numel // max(item.shape[0], 1) if item.shape else 1)
    return None


def _centred(codes: Values, cols: int) -> Values:
    """Codes without the means of their rows and columns, as packing stores them; whole rows only."""
    rows = codes.size // cols if cols else 0
    if rows < 2:
        return codes
    grid = codes[: rows * cols].reshape(rows, cols)
    grid = grid - grid.mean(1, keepdims=True)
    centred: Values = np.rint(grid - grid.mean(0, keepdims=True)).reshape(-1)
    return centred


def _entropy(codes: Values) -> float:
    """Bits a code, order 0."""
    finite = codes[np.isfinite(codes)]
    if not finite.size:
        return 0.0
    share = np.unique(finite, return_counts=True)[1] / finite.size
    return float(-(share * np.log2(share)).sum())


def _sampled(source: SourceCheckpoint, item: SourceItem) -> Values:
    """All elements of a small tensor, 32 pieces of a large one: flat, float64.

    In numpy, because starting torch's threads costs more than arrays of this size.
    """
    if item.numel <= _SAMPLE:
        return _flat(source.chunk(item, Chunk(0, item.numel, item.shape)))
    return np.concatenate(list(_pieces(source, item)))


def _pieces(source: SourceCheckpoint, item: SourceItem) -> Iterator[Values]:
    count = _SAMPLE // _PIECE
    for i in range(count):
        start = (item.numel - _PIECE) * i // (count - 1)
        yield _flat(source.chunk(item, Chunk(start, start + _PIECE, (1, _PIECE))))


def _flat(x: Tensor) -> Values:
    flat = x.reshape(-1)
    if flat.dtype == torch.bfloat16:  # numpy has no bf16
        flat = flat.to(torch.float32)
    return flat.numpy().astype(np.float64)
