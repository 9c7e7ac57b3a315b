"""Size against step error: the choices that `compress` would make at some fractions of a step, and what they come to.

Errors are in closed form: a grid's rounding error is its step / sqrt(12). Sizes are those of some pieces of every
tensor, encoded and packed. `benchmarks/curve.py` compares both with the files that `compress` makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.budget import Budget
from statecodec.choose.choices import Choice, Choices, by_rules
from statecodec.choose.chooser import by_budget
from statecodec.choose.copies import repeated
from statecodec.choose.derived import derived
from statecodec.choose.low_rank import is_low_rank
from statecodec.choose.presets import PRESETS
from statecodec.choose.rules import Policy
from statecodec.choose.since_base import packed_size
from statecodec.choose.widths import SQRT12
from statecodec.codecs import Codec, Direction, Logarithmic, Uniform
from statecodec.codecs.chunking import CHUNK_ELEMENTS, Chunk, chunks
from statecodec.errors import UnencodableValues, UsageError
from statecodec.format import Packing
from statecodec.parallel import default_threads, ordered_map
from statecodec.progress import Meter, Progress

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 17  # elements; two pieces of a tensor are packed, of codes that are predicted the middle chunk
_FRACTIONS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_GRIDS = (Uniform, Direction, Logarithmic)


@dataclass(frozen=True)
class CurvePoint:
    """The estimated size of a whole checkpoint, and the errors of its moments and weights as fractions of one step.

    `step_error` is what was asked for of the moments, which they keep. `weight_step_error` is what the weights will
    have: more where 24 bits are the finest that is stored, 0 where all are exact, None where no step is known. `label`
    names a preset. Points of the curve have none, and were asked for the same error of both.
    """

    nbytes: int
    bytes_per_param: float
    step_error: float
    weight_step_error: float | None
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
        workers, sizes = threads or default_threads(), _Sizes(source)
        points, counted = [], False
        for budget, name in budgets:
            choices = _choices(source, budget, workers)
            counted |= any(isinstance(choice.codec, _GRIDS) for choice in choices.values())
            nbytes = sizes.total(choices, workers)
            numel, error = max(source.report().num_params, 1), _weight_step_error(source, choices)
            points.append(CurvePoint(round(nbytes), nbytes / numel, budget.moments or 0.0, error, name))
            meter.add(source.nbytes)
        if not counted:
            raise UsageError(
                f"{src}: no large tensor here has an error that is counted in optimizer steps; such are moments of "
                "Adam and its kin, momenta, and the weights that either trains"
            )
        return points


def _choices(source: SourceCheckpoint, budget: Budget, threads: int) -> Choices:
    """What `compress` would choose without rules and without a base."""
    choices = by_budget(source, by_rules(source, Policy(()), "lossless"), budget, threads)
    return repeated(source, derived(source, choices, None, Packing()), Packing())


def _weight_step_error(source: SourceCheckpoint, choices: Choices) -> float | None:
    """The rms error of all weights that have a grid, each in its own step: known before anything is encoded."""
    weights = [(item, choices[item.name]) for item in source.items if item.role in ("weight", "master")]
    total, numel = 0.0, 0
    for item, choice in weights:
        if isinstance(choice.codec, Uniform) and choice.unit:
            total += item.numel * (choice.codec.step / SQRT12 / choice.unit) ** 2
            numel += item.numel
    if numel:
        return math.sqrt(total / numel)
    return 0.0 if all(choice.exact or choice.codec.repeats for _, choice in weights) else None


class _Sizes:
    """What tensors pack to under the codecs that are chosen; each is looked at once under every codec."""

    def __init__(self, source: SourceCheckpoint) -> None:
        self._source = source
        self._known: dict[tuple[str, Codec, tuple[Codec, ...]], float] = {}

    def total(self, choices: Choices, threads: int) -> float:
        """Estimated bytes of all tensors."""
        with ordered_map(lambda item: self._of(item, choices), self._source.items, threads) as sizes:
            return math.fsum(sizes)

    def _of(self, item: SourceItem, choices: Choices) -> float:
        choice = choices[item.name]
        others = choice.companions.values() if choice.codec.needs_decoded else ()
        key = (item.name, choice.codec, tuple(choices[name].codec for name in others))
        if key not in self._known:
            self._known[key] = 0.0 if choice.codec.repeats else self._packed(item, choice, choices)
        return self._known[key]

    def _packed(self, item: SourceItem, choice: Choice, choices: Choices) -> float:
        """Bytes of a tensor if all of it packs like some pieces."""
        nbytes = numel = 0
        packing = Packing("auto").settled(is_low_rank(item))
        for chunk in _pieces(item, choice.codec):
            x = self._source.chunk(item, chunk)
            try:
                parts = choice.codec.encode(x, companions=self._companions(choice, choices, chunk)).parts
            except UnencodableValues:
                parts = choice.otherwise.encode(x).parts
            nbytes += packed_size(parts, packing)
            numel += chunk.stop - chunk.start
        return nbytes * item.numel / max(numel, 1)

    def _companions(self, choice: Choice, choices: Choices, chunk: Chunk) -> Mapping[str, Tensor]:
        values = {}
        for role, name in choice.companions.items():
            x = self._source.chunk(self._source.items[self._source.tensors[name].index], chunk)
            values[role] = choices[name].codec.encode(x).decode() if choice.codec.needs_decoded else x
        return values


def _pieces(item: SourceItem, codec: Codec) -> list[Chunk]:
    """Pieces a quarter and three quarters into a tensor. Low rank shows in a whole chunk only."""
    if is_low_rank(item):
        pieces = chunks(codec, item.shape, item.dtype, CHUNK_ELEMENTS)
        return [pieces[len(pieces) // 2]]
    pieces = chunks(codec, item.shape, item.dtype, _PIECE)
    return [pieces[number] for number in {len(pieces) // 4, 3 * len(pieces) // 4}]
