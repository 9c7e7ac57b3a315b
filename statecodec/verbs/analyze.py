"""How much each tensor can be compressed: SNR per tensor and dimension, rules, and size against step error."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from statecodec.checkpoint.base import Checkpoint, Elements, TensorInfo
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.choose.architectures import FusedPart, Layer, parts, recognise
from statecodec.choose.curve import measure_curve
from statecodec.choose.price import update_errors
from statecodec.choose.snr import CUTOFF, LayerSNR, Measurement, Ratios, average, slabs
from statecodec.choose.snr_rules import BASIS, chosen, read_table
from statecodec.errors import UsageError
from statecodec.lazy import torch
from statecodec.parallel import default_threads, ordered_map
from statecodec.progress import Meter, Progress
from statecodec.verbs.analysis import Analysis, TensorSNR


def analyze(
    *sources: str | Path,
    snr: bool = True,
    curve: bool = False,
    cutoff: float = CUTOFF,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measure how much the second moments of a run can be shared, and size against error.

    The signal-to-noise ratio (SNR) of a second moment over some of its dimensions is mean squared over variance along
    them, averaged over the rest. Where it is high, one value along those dimensions does as well as all of them.

    Args:
        *sources: One checkpoint or several of one run, compressed or not; or SNR tables (`.csv`).
        snr: Measure the SNR of every second moment over every subset of its dimensions (float64, streamed), averaged
            over the checkpoints.
        curve: Measure size against error, in optimizer steps, for the checkpoint of the highest step.
        cutoff: Share only dimensions whose SNR is above this.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        What was measured, and the rules that follow from it.

    Raises:
        UsageError: If there is nothing to measure, or checkpoints and tables are mixed.
        PolicyError: For a table that cannot be read.
        FormatError: If a compressed checkpoint cannot be read.
        LayoutError: If an uncompressed one cannot.

    Source:
        SlimAdam (arXiv 2503.01843), section 3.
    """
    started = time.perf_counter()
    if not sources:
        raise UsageError("analyze needs at least one checkpoint")
    if math.isnan(cutoff):
        raise UsageError("cutoff=nan: expected a number, 1 by default")
    tables = [Path(s) for s in sources if str(s).lower().endswith(".csv")]
    if tables and len(tables) != len(sources):
        raise UsageError("analyze takes either checkpoints or SNR tables (.csv), not both at once")
    if tables and curve:
        raise UsageError("a curve needs a checkpoint; an SNR table has no numbers to encode")
    notes: list[str] = []
    steps: list[float | None] = []
    layers: list[LayerSNR] = []
    pieces: dict[str, dict[str, Ratios]] = {}
    workers = threads or default_threads()
    if tables:
        layers = _tables(tables)
    elif snr:
        layers, pieces, steps = _measure(sources, workers, progress, notes)
    orders = [step if step is not None else -math.inf for step in steps] or [0.0] * len(sources)
    last = sources[max(range(len(sources)), key=lambda i: (orders[i], i))]
    points = measure_curve(last, threads=threads, progress=progress) if curve else ()
    errors: dict[str, float] = {}
    if layers and not tables:
        with open_checkpoint(last) as checkpoint:
            errors = update_errors(checkpoint, {b: chosen(layers, cutoff, b) for b in BASIS}, workers, progress)
    tensors = _tensors(layers, pieces, cutoff)
    return Analysis(
        tuple(map(str, sources)),
        tuple(steps),
        cutoff,
        tensors,
        tuple(layers),
        tuple(points),
        tuple(notes),
        time.perf_counter() - started,
        errors,
    )


def _tables(paths: Sequence[Path]) -> list[LayerSNR]:
    """Several tables of one run, each averaged over its own steps, weigh alike."""
    by_name: dict[str, list[LayerSNR]] = {}
    for path in paths:
        for layer in read_table(path):
            by_name.setdefault(layer.name, []).append(layer)
    return [_averaged(group) for group in by_name.values()]


def _averaged(group: Sequence[LayerSNR]) -> LayerSNR:
    if len({layer.shape for layer in group}) > 1:
        shapes = ", ".join(str(list(layer.shape)) for layer in group[:3])
        raise UsageError(f"{group[0].name} has different shapes ({shapes}): these are not of one run")
    return LayerSNR(group[0].name, group[0].shape, average(x.ratios for x in group), group[0].shareable)


def _measure(
    sources: Sequence[str | Path], threads: int, progress: Progress | None, notes: list[str]
) -> tuple[list[LayerSNR], dict[str, dict[str, Ratios]], list[float | None]]:
    by_name: dict[str, list[LayerSNR]] = {}
    pieces: dict[str, dict[str, list[Ratios]]] = {}
    steps: list[float | None] = []
    for path in sources:
        with open_checkpoint(path) as checkpoint:
            steps.append(next((m.step for m in checkpoint.moments), None))
            for layer, in_parts in _measure_one(checkpoint, threads, progress, notes):
                by_name.setdefault(layer.name, []).append(layer)
                for part, ratios in in_parts.items():
                    pieces.setdefault(layer.name, {}).setdefault(part, []).append(ratios)
    if not by_name:
        _refuse_encoded(sources[0])
        raise UsageError(f"{sources[0]}: no second moments (exp_avg_sq), which the SNR is of; --curve alone needs none")
    missing = [name for name, group in by_name.items() if len(group) != len(sources)]
    if missing:
        notes.append(f"not in every checkpoint: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")
    averaged = {name: {part: average(r) for part, r in group.items()} for name, group in pieces.items()}
    return [_averaged(group) for group in by_name.values()], averaged, steps


def _refuse_encoded(source: str | Path) -> None:
    """Raise UsageError if the second moments are there, but as a live optimizer holds them."""
    with open_checkpoint(source) as checkpoint:
        if any(t.state is not None and t.state.role == "exp_avg_sq" for t in checkpoint.report().tensors):
            raise UsageError(
                f"{source}: its second moments are encoded by a live optimizer; `convert --to torch` makes dense ones, "
                "of which the SNR can be measured"
            )


def _measure_one(
    checkpoint: Checkpoint, threads: int, progress: Progress | None, notes: list[str]
) -> list[tuple[LayerSNR, dict[str, Ratios]]]:
    moments = [t for t in checkpoint.items if t.role == "exp_avg_sq"]
    shapes = {_name(t): t.shape for t in moments}
    by_moment = recognise(shapes)
    if len(shapes) != len(moments):
        raise UsageError(
            f"{checkpoint.path}: two second moments belong to one parameter; analyze one file of it at a time"
        )
    anonymous = sum(t.param is None for t in moments)
    if anonymous:
        notes.append(
            f"{checkpoint.path}: {anonymous} second moments without a parameter's name; rules name the states instead"
        )
    if isinstance(checkpoint, StoredCheckpoint):
        notes.append(f"{checkpoint.path} is compressed: SNRs are those of its stored second moments")
    meter = Meter(progress, sum(t.nbytes for t in moments), "measuring SNR")

    def measure(tensor: TensorInfo) -> tuple[TensorInfo, Ratios, dict[str, Ratios]]:
        return tensor, *_ratios(checkpoint, tensor, by_moment[_name(tensor)])

    results = []
    with ordered_map(measure, moments, threads) as measured:
        for tensor, ratios, in_parts in measured:
            layer = by_moment[_name(tensor)]
            results.append((LayerSNR(layer.name, tensor.shape, ratios, layer.shareable), in_parts))
            meter.add(tensor.nbytes)
    return results


def _ratios(checkpoint: Checkpoint, tensor: TensorInfo, layer: Layer) -> tuple[Ratios, dict[str, Ratios]]:
    """The SNRs of one tensor and of the q, k and v in it, in one pass over its chunks."""
    if not tensor.shape or not math.prod(tensor.shape):
        return {}, {}
    fused = parts(layer, tensor.shape)
    whole = Measurement(tensor.shape)
    inside = [Measurement(_part_shape(p, tensor.shape)) for p in fused]
    elements, row = Elements(checkpoint.stream(tensor)), math.prod(tensor.shape[1:])
    for start, stop in slabs(tensor.shape):
        slab = elements.take((stop - start) * row).view(stop - start, *tensor.shape[1:])
        if bool((slab < 0).any()) or not bool(slab.isfinite().all()):
            raise UsageError(f"{tensor.name}: a second moment holds negative values, infinities or NaN; it has no SNR")
        whole.add(slab)
        for part, measurement in zip(fused, inside, strict=True):
            piece = _cut(slab, part, start, stop)
            if piece.numel():
                measurement.add(piece)
    return whole.ratios(), {p.name: m.ratios() for p, m in zip(fused, inside, strict=True)}


def _part_shape(part: FusedPart, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start if d == part.dim else n for d, n in enumerate(shape))


def _cut(slab: torch.Tensor, part: FusedPart, start: int, stop: int) -> torch.Tensor:
    if part.dim == 1:
        return slab[:, part.start : part.stop]
    return slab[max(part.start - start, 0) : max(min(part.stop, stop) - start, 0)]


def _tensors(
    layers: Sequence[LayerSNR], pieces: Mapping[str, Mapping[str, Ratios]], cutoff: float
) -> tuple[TensorSNR, ...]:
    recognised = recognise({layer.name: layer.shape for layer in layers})
    by_type = chosen(layers, cutoff, "type")
    return tuple(
        TensorSNR(
            layer.name,
            recognised[layer.name].kind,
            layer.shape,
            dict(layer.ratios),
            layer.dims(cutoff),
            by_type[layer.name],
            recognised[layer.name].recommended,
            dict(pieces.get(layer.name, {})),
        )
        for layer in layers
    )


def _name(tensor: TensorInfo) -> str:
    return tensor.param or tensor.name
