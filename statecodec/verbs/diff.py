"""Compares checkpoint B with checkpoint A: the error of every tensor, and of every Adam update direction."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from statecodec import kernels
from statecodec.checkpoint.base import Checkpoint, Elements, TensorInfo
from statecodec.checkpoint.open import loaded, open_checkpoint
from statecodec.checkpoint.report import DiffReport, TensorDiff, UpdateReport, ValueDiff
from statecodec.choose.step_size import StepSize, update_settings, update_size
from statecodec.errors import StatecodecError
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, NO_UPDATE, Comparison, UpdateComparison, UpdateSize
from statecodec.layouts import Moments
from statecodec.lazy import torch
from statecodec.parallel import default_threads, ordered_map
from statecodec.progress import Meter, Progress
from statecodec.roles import SKELETON_ROLES, family
from statecodec.verbs.rest_diff import without_checksums
from statecodec.verbs.step_errors import MeasuredSteps
from statecodec.verbs.value_diff import value_diffs

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 18  # elements compared at a time: four such pieces stay in a core's cache


def diff(a: str | Path, b: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> DiffReport:
    """Compare checkpoint B with checkpoint A; either may be compressed or not.

    Tensors are matched by name. For each parameter whose exp_avg and exp_avg_sq are in both, the Adam update direction
    u = m_hat / (sqrt(v_hat) + eps) of both is compared, with A's betas, eps and step. What is not a tensor is compared
    byte by byte, file by file, but for checksums of tensors.

    Args:
        a: The checkpoint that errors are measured against.
        b: The other checkpoint.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report. `identical` says whether every byte is the same.

    Raises:
        FormatError: If a compressed checkpoint cannot be read.
        LayoutError: If an uncompressed one cannot.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, value in (("a", 1.0), ("b", 1.5)):
        ...         torch.save({"w": torch.full((8, 8), value)}, f"{folder}/{name}.pt")
        ...     report = statecodec.diff(f"{folder}/a.pt", f"{folder}/b.pt")
        >>> report.identical, report.tensors[0].relative_rms
        (False, 0.5)
    """
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return compare(first, second, threads or default_threads(), progress)


def compare(
    a: Checkpoint, b: Checkpoint, threads: int, progress: Progress | None = None, *, checksums: bool = False
) -> DiffReport:
    """`diff` of open checkpoints; `checksums`: what follows from tensors counts as bytes outside of them, too."""
    started = time.perf_counter()
    pairs_by_name = [(t, b.tensors[name]) for name, t in a.tensors.items() if name in b.tensors]
    shared = [t for t, other in pairs_by_name if _comparable(t, other)]
    unlike = [(t, o) for t, o in pairs_by_name if not _comparable(t, o) and t.role not in SKELETON_ROLES]
    notes = [
        f"{t.name}: not comparable: {t.dtype} {list(t.shape)} in A, {o.dtype} {list(o.shape)} in B" for t, o in unlike
    ]
    pairs = [m for m in a.moments if _comparable_update(m, a, b)]
    sizes = [math.prod(t.shape) for t in shared] + [math.prod(a.tensors[m.exp_avg].shape) * 2 for m in pairs]
    meter = Meter(progress, sum(sizes), "comparing")

    def compare(tensor: TensorInfo) -> tuple[TensorInfo, _Compared]:
        return tensor, _compare_tensors(a, tensor, b, b.tensors[tensor.name])

    tensors, sums, rest, steps = [], _Totals(), _one_sided_rest(a, b), MeasuredSteps(a)
    with ordered_map(compare, shared, threads) as compared:
        for tensor, result in compared:
            meter.add(math.prod(tensor.shape))
            if tensor.role not in SKELETON_ROLES:
                tensors.append(_tensor_diff(tensor, result))
                sums.add_tensor(family(tensor.role), result.numbers)
                steps.add_tensor(tensor, result.numbers)
            elif result.differing and (checksums or _rest_differs(a, b, tensor)):
                rest.add(_file(a, tensor))

    def update(m: Moments) -> tuple[Moments, UpdateComparison, StepSize | None]:
        return m, *_compare_update(a, b, m)

    updates = []
    with ordered_map(update, pairs, threads) as changes:
        for moments, change, unit in changes:
            numel = math.prod(a.tensors[moments.exp_avg].shape)
            meter.add(2 * numel)
            updates.append(_update_report(moments, numel, change))
            sums.add_update(change)
            steps.add_update(moments, unit, updates[-1].u_rms)
            if change.nonfinite:
                notes.append(f"{moments.param or moments.exp_avg}: {change.nonfinite} update elements are not finite")
    steps.add_quantised(threads)
    values = _values(a, b) if rest else None
    if values == ():
        notes.append("outside tensors every value is the same; it is only written differently")
    return DiffReport(
        a=str(a.path),
        b=str(b.path),
        tensors=steps.counted(tensors),
        updates=tuple(updates),
        total={**sums.total(), **steps.total()},
        only_in_a=_missing(a, b),
        only_in_b=_missing(b, a),
        not_comparable=tuple(t.name for t, _ in unlike),
        rest_differs=tuple(sorted(rest)),
        values=values or (),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _values(a: Checkpoint, b: Checkpoint) -> tuple[ValueDiff, ...] | None:
    """The values beside the tensors that differ; None if one of the checkpoints cannot be loaded."""
    try:
        return value_diffs(*(loaded(side, torch.device("meta")) for side in (a, b)))
    except StatecodecError:
        return None


class _Compared(NamedTuple):
    """One tensor of A compared with that of B: as numbers, or as the count of different elements; and bit by bit."""

    numbers: Comparison = NO_DIFFERENCE
    differing: int = 0
    same_bits: bool = True


def _compare_tensors(a: Checkpoint, tensor: TensorInfo, b: Checkpoint, other: TensorInfo) -> _Compared:
    """Compare one tensor of A with one of B (same shape), streamed."""
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        differing = _unequal(a.stream(tensor), b.stream(other))
        return _Compared(differing=differing, same_bits=not differing)
    left, right = Elements(a.stream(tensor)), Elements(b.stream(other))
    total, same_bits = NO_DIFFERENCE, tensor.dtype == other.dtype
    for count in _pieces(math.prod(tensor.shape)):
        x, y = left.take(count), right.take(count)
        if x.dtype != y.dtype:
            x, y = x.to(torch.float64), y.to(torch.float64)
        same_bits = same_bits and torch.equal(_bits(x), _bits(y))
        total = total.merged(kernels.host().compare(x, y))
    return _Compared(total, same_bits=same_bits)


def _bits(x: Tensor) -> Tensor:
    """Elements as integers, so that NaNs equal themselves, and -0.0 is not 0.0."""
    return x.contiguous().view({4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _compare_update(a: Checkpoint, b: Checkpoint, m: Moments) -> tuple[UpdateComparison, StepSize | None]:
    """Compare an update of A with that of B; with it its size in A."""
    names = (m.exp_avg, m.exp_avg_sq)
    streams = [Elements(s.stream(s.tensors[name])) for s in (a, b) for name in names]
    total, sizes = NO_UPDATE, list[UpdateSize]()
    for count in _pieces(math.prod(a.tensors[m.exp_avg].shape)):
        first, second, other_first, other_second = (s.take(count).to(torch.float32) for s in streams)
        comparison = kernels.host().compare_updates(first, second, other_first, other_second, **update_settings(m))
        total = total.merged(comparison)
        sizes.append(update_size(first, second, m))
    return total, StepSize.of(sizes, m)


def _rest_differs(a: Checkpoint, b: Checkpoint, skeleton: TensorInfo) -> bool:
    """Whether bytes outside tensors differ that do not follow from the tensors."""
    sides = ((a, skeleton), (b, b.tensors[skeleton.name]))
    return bool(_unequal(*(without_checksums(side, of) for side, of in sides)))


def _unequal(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> int:
    """Elements that differ, of integers, booleans or bytes."""
    left, right = iter(a), iter(b)
    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
    x, y, count = nothing, nothing, 0
    while True:
        if not x.numel():
            x = next(left, nothing)
        if not y.numel():
            y = next(right, nothing)
        size = min(x.numel(), y.numel())
        if not size:
            return count + x.numel() + y.numel()
        same = x[:size].view(torch.uint8) == y[:size].view(torch.uint8)
        count += int((~same.view(size, -1).all(1)).sum())
        x, y = x[size:], y[size:]


def _pieces(total: int) -> Iterator[int]:
    for start in range(0, total, _PIECE):
        yield min(_PIECE, total - start)


def _comparable(a: TensorInfo, b: TensorInfo) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or (a.dtype.is_floating_point and b.dtype.is_floating_point))


def _comparable_update(m: Moments, a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both sides have both moments, as floats of one shape."""
    moments = [s.tensors.get(name) for s in (a, b) for name in (m.exp_avg, m.exp_avg_sq)]
    return len({t.shape if t and t.dtype.is_floating_point else None for t in moments}) == 1 and None not in moments


def _missing(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    return tuple(name for name, t in a.tensors.items() if name not in b.tensors and t.role not in SKELETON_ROLES)


def _one_sided_rest(a: Checkpoint, b: Checkpoint) -> set[str]:
    """Files that only one side has, and files whose bytes outside tensors differ in number."""
    names = set(a.listing) ^ set(b.listing)
    for side, other in ((a, b), (b, a)):
        for name, t in side.tensors.items():
            if t.role in SKELETON_ROLES and (name not in other.tensors or other.tensors[name].shape != t.shape):
                names.add(_file(a, t))
    return names


def _file(a: Checkpoint, rest: TensorInfo) -> str:
    """The file of the directory that these bytes belong to; a single file has its name in A."""
    return rest.name.rpartition(":")[0] or a.path.name


def _tensor_diff(tensor: TensorInfo, compared: _Compared) -> TensorDiff:
    c = compared.numbers
    return TensorDiff(
        name=tensor.name,
        role=tensor.role,
        shape=tensor.shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        rms=math.sqrt(c.sum_sq_diff / max(math.prod(tensor.shape), 1)),
        relative_rms=_relative(c.sum_sq_diff, c.sum_sq),
        max_abs=c.max_abs_diff,
        mismatched=c.mismatched,
        differing=compared.differing,
        identical=compared.same_bits,
    )


def _update_report(m: Moments, numel: int, c: UpdateComparison) -> UpdateReport:
    return UpdateReport(
        m.param or m.exp_avg,
        m.exp_avg,
        numel,
        _relative(c.sum_sq_diff, c.sum_sq),
        c.max_abs_other,
        c.max_abs,
        _cosine(c.sum_sq, c.sum_sq_other, c.dot),
    )


def _relative(error: float, size: float) -> float:
    if size:
        return math.sqrt(error / size)
    return math.inf if error else 0.0


def _cosine(a: float, b: float, dot: float) -> float:
    if a and b:
        return min(1.0, dot / math.sqrt(a * b))
    return 1.0 if a == b else 0.0


class _Totals:
    """Sums over all tensors by role, and over all updates."""

    def __init__(self) -> None:
        self._roles: dict[str, Comparison] = {}
        self._updates = NO_UPDATE

    def add_tensor(self, role: str, c: Comparison) -> None:
        self._roles[role] = self._roles.get(role, NO_DIFFERENCE).merged(c)

    def add_update(self, c: UpdateComparison) -> None:
        self._updates = self._updates.merged(c)

    def total(self) -> dict[str, float]:
        """relative_rms of each family of roles, and of all updates: u_rms, max_u, max_u_exact, cosine."""
        figures = {f"{role}_relative_rms": _relative(c.sum_sq_diff, c.sum_sq) for role, c in self._roles.items()}
        u = self._updates
        if u != NO_UPDATE:
            figures |= {"u_rms": _relative(u.sum_sq_diff, u.sum_sq), "max_u": u.max_abs_other, "max_u_exact": u.max_abs}
            figures["cosine"] = _cosine(u.sum_sq, u.sum_sq_other, u.dot)
        return figures
