"""Whether a preset's 8-bit codes suit each moment, by a sample of its rows; what suits better where they do not.

A logarithmic code covers (top - 1) / steps octaves below its group's largest value; what lies lower decodes too large
and its update comes out too small. A softsign code has no bits left for what is a thousandth of its group's largest,
while the update, m / sqrt(v), may be as large there as elsewhere. Transformers' rows span a dozen octaves, a layer
behind dead units may span fifty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from statecodec import kernels
from statecodec.checkpoint.base import TensorInfo
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose.choices import Choice, Choices
from statecodec.codecs import Cast, Codec, Companded, Raw, rows_cols
from statecodec.codecs.chunking import Chunk
from statecodec.errors import UnencodableValues
from statecodec.kernels.reference.statistics import NO_UPDATE
from statecodec.layouts import Moments

_SAMPLE = 1 << 15  # elements in each of three places
_STEPS = (18, 15, 12, 10, 8, 6)
_WORST = 0.012  # relative error of the update beyond which the tensor is kept exact


class _Fit:
    """Replacements for the codecs of the moments that a preset chose, found tensor by tensor."""

    def __init__(self, source: SourceCheckpoint, choices: Choices) -> None:
        self.source, self.choices = source, choices
        self.fitted: dict[str, Choice] = {}
        self.notes: list[str] = []

    def preset_codec(self, name: str, curve: str) -> Companded | None:
        """The item's codec, if the preset gave it 8-bit codes of that curve."""
        choice = self.choices[name]
        codec = choice.codec
        if not isinstance(codec, Companded) or (codec.curve, codec.bits) != (curve, 8) or choice.settled:
            return None
        return codec

    def places(self, name: str) -> list[Tensor]:
        return list(_places(self.source, self.source.tensors[name]))

    def second(self, name: str, codec: Companded) -> None:
        """Space the log codes as the range wants, or keep the tensor exact."""
        groups = [_octaves(x, codec.group) for x in self.places(name)]
        octaves = torch.cat([g for g in groups if g.numel()] or [torch.zeros(1, dtype=torch.float32, device="cpu")])
        errors = {steps: _error(octaves, steps, codec.levels.top) for steps in _STEPS}
        best = min(errors, key=lambda steps: errors[steps])
        if errors[best] > _WORST:
            reason = f"kept exact, because its rows span {int(octaves.max()) + 1} octaves"
            self.fitted[name] = Choice(Raw(), reason)
            self.notes.append(f"{name}: {reason}")
        elif best != codec.levels.steps:
            self.fitted[name] = Choice(replace(codec, steps=best), "spaced for its range")

    def first(self, moments: Moments, codec: Companded) -> None:
        """Smaller groups or bf16 where the update direction would suffer."""
        pairs = list(zip(self.places(moments.exp_avg), self.places(moments.exp_avg_sq), strict=True))
        for candidate in (codec, replace(codec, group=32), Cast("bf16")):
            if _update_error(pairs, candidate, moments) <= _WORST:
                break
        if candidate != codec:
            reason = "bf16" if isinstance(candidate, Cast) else "smaller groups"
            reason += ", because 8-bit codes would lose its smaller updates"
            self.fitted[moments.exp_avg] = Choice(candidate, reason)
            if isinstance(candidate, Cast):
                self.notes.append(f"{moments.exp_avg}: {reason}")


def fitted(source: SourceCheckpoint, choices: Choices) -> Choices:
    """The same choices, with other codecs where the preset's 8-bit codes do not suit a moment."""
    fit = _Fit(source, choices)
    for name in choices:
        codec = fit.preset_codec(name, "log")
        if codec is not None:
            fit.second(name, codec)
    for moments in source.moments:
        codec = fit.preset_codec(moments.exp_avg, "softsign")
        if codec is not None and source.tensors[moments.exp_avg].shape == source.tensors[moments.exp_avg_sq].shape:
            fit.first(moments, codec)
    return choices.updated(fit.fitted, tuple(fit.notes))


def _update_error(pairs: list[tuple[Tensor, Tensor]], codec: Codec, moments: Moments) -> float:
    """u-rms over the samples with encoded first and exact second moments; 0 for values that no codec takes."""
    total = NO_UPDATE
    for m, v in pairs:
        try:
            decoded = codec.encode(m).decode()
        except UnencodableValues:
            return 0.0  # found and named when the whole tensor is encoded
        m_flat, v_flat = m.reshape(-1), v.reshape(-1)
        total = total.merged(
            kernels.host().compare_updates(
                m_flat, v_flat, decoded.reshape(-1), v_flat, correction1=1.0, correction2=1.0, eps=moments.eps
            )
        )
    return math.sqrt(total.sum_sq_diff / total.sum_sq) if total.sum_sq else 0.0


def _places(source: SourceCheckpoint, item: TensorInfo) -> Iterator[Tensor]:
    """Rows from the beginning, the middle and the end of an item; a part of a row where rows are long."""
    rows, cols = rows_cols(item.shape)
    height = max(1, min(rows, _SAMPLE // max(cols, 1)))
    for row in sorted({0, (rows - height) // 2, rows - height}):
        start = row * cols
        shape = (height, cols) if height > 1 or cols <= _SAMPLE else (1, _SAMPLE)
        yield source.chunk(source.items[item.index], Chunk(start, start + math.prod(shape), shape)).to(torch.float32)


def _octaves(x: Tensor, group: int) -> Tensor:
    """For every positive value, how many octaves it lies below the largest of its group."""
    cols = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -cols % group)).view(x.shape[0], -1, group)
    largest = padded.amax(-1, keepdim=True).expand_as(padded)
    positive = padded > 0
    return (largest[positive].double().log2() - padded[positive].double().log2()).nan_to_num(0.0, 0.0, 0.0)


def _error(octaves: Tensor, steps: int, top: int) -> float:
    """Relative rms error of 1 / sqrt(v): that of rounding to the nearest code, and of what lies below the lowest."""
    rounding = math.log(2) / (2 * steps) / math.sqrt(12)
    below = (octaves - (top - 1) / steps).clamp(min=0)
    clamped = float((1 - torch.exp2(-below / 2)).square().mean())
    return math.sqrt(rounding**2 + clamped)
