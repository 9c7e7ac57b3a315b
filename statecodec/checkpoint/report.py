"""What the verbs return: frozen records. They print as tables; `to_json()` is what the CLI prints with --json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from statecodec.checkpoint.states import EncodedState
from statecodec.figures import asked, error, ratio, size, table

_T = TypeVar("_T")
_NOTES = 10  # that are printed


@dataclass(frozen=True)
class TensorReport:
    """One stored tensor. `error` holds `rms`, `relative_rms` and `max_abs` of decoding where they were measured;
    `state` is what the tensor is a part of, where a live optimizer keeps its states encoded.
    """

    name: str
    role: str
    param: str | None
    shape: tuple[int, ...]
    dtype: str
    codec: str
    bytes_before: int
    bytes_after: int
    error: dict[str, float] | None = None
    state: EncodedState | None = None


@dataclass(frozen=True)
class UpdateReport:
    """What encoding did to one parameter's Adam update direction u = m_hat / (sqrt(v_hat) + eps).

    u_rms = ||u' - u|| / ||u||; max_u and max_u_exact are the largest |u'| and |u|; cosine of u' and u. `exp_avg` is the
    name of that tensor: files of one directory may have parameters of one name.
    """

    param: str | None
    exp_avg: str
    numel: int
    u_rms: float
    max_u: float
    max_u_exact: float
    cosine: float


@dataclass(frozen=True)
class PickleReport:
    """What unpickling what is in one file of the original would import; nothing here ever does.

    Args:
        file: its path.
        globals: module and name of each class or function.
        can_run_code: those of them that do more than make values.
        unread: why some of it cannot be told; None if all can be. What cannot be told can run code.
    """

    file: str
    globals: tuple[str, ...]
    can_run_code: tuple[str, ...]
    unread: str | None = None


@dataclass(frozen=True)
class Report:
    """What a checkpoint is made of, and what a verb did to it."""

    path: str
    format_version: tuple[int, int] | None
    source: dict[str, Any]
    bytes: int
    tensors: tuple[TensorReport, ...]
    seconds: float
    preset: str | None = None
    rules: tuple[str, ...] = ()
    updates: tuple[UpdateReport, ...] = ()
    total: dict[str, float] | None = None
    asked: Mapping[str, float] | None = None
    """The largest errors that were asked for, in optimizer steps, under their names in `total`: by a preset or by an
    option; empty if none was. None where the file does not say.
    """
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    """What the preset promises and found nothing to do it to."""
    pickles: tuple[PickleReport, ...] = ()
    """Of the original, where the verb looked: `inspect` and `compress`, every other one with `safe_only`."""

    @property
    def num_params(self) -> int:
        """Parameters, each counted once: elements of the weights, or else of the first of their copies or states that
        is there; without any, of all tensors of real and complex numbers.
        """
        for role in ("weight", "master", "ema", "exp_avg", "momentum"):
            states = {t.state for t in self.tensors if t.state is not None and t.state.role == role}
            shapes = [t.shape for t in self.tensors if t.role == role] + [state.shape for state in states]
            count = sum(map(math.prod, shapes))
            if count:
                return count
        return sum(math.prod(t.shape) for t in self.tensors if "float" in t.dtype or "complex" in t.dtype)

    @property
    def ratio(self) -> float | None:
        """Source bytes over bytes."""
        return self.source["bytes"] / self.bytes if self.bytes else None

    @property
    def bytes_per_param(self) -> float | None:
        """Bytes of the whole file over `num_params`."""
        return self.bytes / self.num_params if self.num_params else None

    def __str__(self) -> str:
        return _report_text(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["format_version"] = list(self.format_version) if self.format_version else None
        derived = {"ratio": self.ratio, "bytes_per_param": self.bytes_per_param, "num_params": self.num_params}
        document: dict[str, Any] = jsonable({**plain, **derived})
        return document


@dataclass(frozen=True)
class TensorDiff:
    """Error of one tensor of B against A.

    mismatched: elements that are NaN or infinite on one side only. differing: elements that differ, of a tensor that
    is not compared as numbers (integers, booleans, complex numbers, 8-bit floats). identical: the same bits.
    step_error: rms as a fraction of the optimizer step that trains it; None where that is not known.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    rms: float
    relative_rms: float
    max_abs: float
    mismatched: int = 0
    differing: int = 0
    identical: bool = True
    step_error: float | None = None


@dataclass(frozen=True)
class ValueDiff:
    """One value that is another in B, by its key path; `-` stands for one that is not there."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class DiffReport:
    """B against A: every tensor, every Adam update, totals; names that stand on one side only.

    rest_differs: files in which bytes that belong to no tensor differ (settings, schedulers, metadata, files that are
    no checkpoint), or that stand on one side only. values: the settings and counters that differ in them, at most 200;
    none where the files cannot be read, or only differ in how they write the same.
    """

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    updates: tuple[UpdateReport, ...]
    total: dict[str, float]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    not_comparable: tuple[str, ...] = ()
    rest_differs: tuple[str, ...] = ()
    values: tuple[ValueDiff, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def tensors_equal(self) -> bool:
        """Every tensor is there on both sides, with the same numbers."""
        one_sided = self.only_in_a or self.only_in_b or self.not_comparable
        return not one_sided and not any(t.max_abs or t.mismatched or t.differing for t in self.tensors)

    @property
    def identical(self) -> bool:
        """Every byte of A, restored, is that of B: tensors bit for bit, and everything else."""
        return self.tensors_equal and all(t.identical for t in self.tensors) and not self.rest_differs

    def __str__(self) -> str:
        return _diff_text(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        verdict = {"identical": self.identical, "tensors_equal": self.tensors_equal}
        document: dict[str, Any] = jsonable({**dataclasses.asdict(self), **verdict})
        return document


def jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN and no infinity
    return value


def _report_text(report: Report) -> str:
    """A row for each role and codec, then the Adam update and the notes."""
    before, per_param = report.source["bytes"], report.bytes_per_param
    line = [f"{report.path}: {size(report.bytes)}"]
    if report.format_version is not None:
        line += [f"from {size(before)}", ratio(before, report.bytes)]
    line += [report.source["framework"]] if report.source.get("framework") else []
    line += [f"{per_param:.2f} B/param"] if per_param else []
    line += [words] if (words := asked(report.preset, report.asked)) else []
    rows = []
    for (role, codec), group in _grouped(report.tensors, lambda t: (t.role, t.codec.partition("(")[0])):
        sizes = sum(t.bytes_before for t in group), sum(t.bytes_after for t in group)
        errors = [_worst(t.error.get(figure) for t in group if t.error) for figure in ("relative_rms", "step_error")]
        rows.append(
            [role, codec, f"{len(group):,}", *map(size, sizes), "exact" if codec == "raw" else errors[0], errors[1]]
        )
    head = ["role", "codec", "tensors", "before", "after", "rel. rms", "in steps"]
    return _joined(", ".join(line), table(head, rows, 2), report)


def _diff_text(report: DiffReport) -> str:
    """A row for each role, then the Adam update and what differs besides."""
    line = f"{report.b} against {report.a}: " + ("identical" if report.identical else "different")
    rows = []
    for (role,), group in _grouped(report.tensors, lambda t: (t.role,)):
        figures = (_worst(getattr(t, name) for t in group) for name in ("relative_rms", "max_abs"))
        rows.append([role, f"{len(group):,}", *figures])
    text = _joined(line, table(["role", "tensors", "rel. rms", "largest"], rows), report)
    rest = ", ".join(report.rest_differs[:5])
    values = [f"{v.name}: {v.a} in A, {v.b} in B" for v in report.values[:_NOTES]]
    return "\n".join([text, *([f"not tensors, and different: {rest}"] if rest else []), *values])


def _worst(values: Iterable[float | None]) -> str:
    """The largest of the errors that are known; NaN, should there be any, wins."""
    errors = [value for value in values if value is not None]
    return error(max(errors, key=lambda v: math.inf if math.isnan(v) else v)) if errors else ""


def _joined(line: str, rows: str, report: Report | DiffReport) -> str:
    total = report.total or {}
    update = [f"Adam update: u-rms {error(total['u_rms'])}"] if total.get("u_rms") is not None else []
    notes = [f"note: {note}" for note in report.notes[:_NOTES]]
    more = [f"and {len(report.notes) - _NOTES} more notes"] if len(report.notes) > _NOTES else []
    return "\n".join([line, "", rows, "", *update, *notes, *more])


def _grouped(tensors: Iterable[_T], key: Callable[[_T], tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[_T]]]:
    groups: dict[tuple[str, ...], list[_T]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return sorted(groups.items())
