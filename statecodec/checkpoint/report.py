"""What the verbs return: frozen records. They print as tables; `to_json()` is what the CLI prints with --json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from statecodec.checkpoint.states import EncodedState
from statecodec.figures import asked, error, percent, ratio, size, step_errors, table, worst_weight

_T = TypeVar("_T")
_NOTES = 10  # printed at most


@dataclass(frozen=True)
class TensorReport:
    """One stored tensor.

    Args:
        name: Its key path.
        role: `weight`, `master`, `exp_avg`, `exp_avg_sq`, ... or `other`; `skeleton` for the bytes that are no tensor.
        param: The parameter that it belongs to, if that is known.
        shape: Its shape.
        dtype: The name of its dtype before it was encoded.
        codec: The text of its codec.
        bytes_before: Its bytes in the source.
        bytes_after: Its bytes in the file, packed.
        error: `rms`, `relative_rms` and `max_abs` of decoding, where they were measured; `step_error` in optimizer
            steps.
        state: The state of a live optimizer that it is an encoded part of.
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

    Args:
        param: The parameter, if it is known.
        exp_avg: Name of the first moment: files of one directory may have parameters of one name.
        numel: Number of elements.
        u_rms: ||u' - u|| / ||u||, where u' is the update after decoding: the update's part of the step error.
        max_u: Largest |u'|.
        max_u_exact: Largest |u|.
        cosine: Cosine between u' and u.
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
    """What unpickling one file of the original would import. This library never unpickles it.

    Args:
        file: Its path.
        globals: Module and name of each class or function.
        can_run_code: Those of them that do more than make values.
        unread: Why some of it cannot be told, or None. What cannot be told counts as able to run code.
    """

    file: str
    globals: tuple[str, ...]
    can_run_code: tuple[str, ...]
    unread: str | None = None


@dataclass(frozen=True)
class Report:
    """What a checkpoint is made of, and what a verb did to it.

    Args:
        path: The file that the report is of.
        format_version: (major, minor) of a compressed file; None for another.
        source: Of the original: `layout`, `bytes`, `sha256`, `name` and more.
        bytes: Size of all files, in bytes.
        tensors: The stored tensors.
        seconds: How long the verb took.
        preset: The preset, if there was one.
        rules: The texts of the rules that were used.
        updates: What encoding did to each parameter's Adam update, where that was measured.
        total: Errors over all tensors; in optimizer steps `u_rms` (of the Adam updates), `momentum_step_error` (of
            momenta without second moments, each in its own rms) and `weight_step_error`.
        asked: The largest errors that a preset or option asked for and some tensor is bounded by, in optimizer steps,
            under their names in `total`; None where the file does not say.
        notes: What was left out or done otherwise, and why.
        files: Paths of all files of a compressed checkpoint.
        unmet: What the preset stands for and found no tensors for.
        pickles: What unpickling the original would import; of `inspect` and `compress`, of other verbs with
            `safe_only`.
    """

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
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    pickles: tuple[PickleReport, ...] = ()

    @property
    def num_params(self) -> int:
        """Number of parameters, each counted once.

        These are the elements of the weights; without weights, those of the first of their copies or states that are
        there; without any of those, of all tensors of real and complex numbers.
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
        """Bytes of the source over bytes of the files."""
        return self.source["bytes"] / self.bytes if self.bytes else None

    @property
    def bytes_per_param(self) -> float | None:
        """Bytes of the files over `num_params`."""
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
    """The error of one tensor of B against A.

    Args:
        name: Its name.
        role: Its role in A.
        shape: Its shape.
        dtype: Its dtype in A.
        rms: Root mean square of B - A.
        relative_rms: ||B - A|| / ||A||.
        max_abs: Largest |B - A|.
        mismatched: Elements that are NaN or infinite on one side only.
        differing: Elements that differ, of a tensor that is not compared as numbers (integers, booleans, complex
            numbers, 8-bit floats).
        identical: Whether all bits are the same.
        step_error: Of a weight, `rms` as a fraction of the optimizer step that trains it; of Adam's first moment, the
            `u_rms` of its update; of a momentum without a second moment, `rms` as a fraction of its own. None where
            no such unit is known.
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
    """One value beside the tensors that differs.

    Args:
        name: Its key path.
        a: Its text in A; `-` if it is not there.
        b: Its text in B; `-` if it is not there.
    """

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class DiffReport:
    """Checkpoint B compared with checkpoint A.

    Args:
        a: Path of A.
        b: Path of B.
        tensors: The errors of all tensors that are on both sides.
        updates: What differs in each parameter's Adam update.
        total: Errors over all tensors.
        only_in_a: Names of tensors that only A has.
        only_in_b: Names of tensors that only B has.
        not_comparable: Names of tensors whose shapes or kinds of dtype differ.
        rest_differs: Files in which bytes outside tensors differ (settings, schedulers, metadata, files that are no
            checkpoint), and files that are on one side only.
        values: The settings and counters that differ in those files, at most 200. Empty where the files cannot be read,
            or write the same values differently.
        notes: What was left out, and why.
        seconds: How long it took.
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
        """Whether every tensor is on both sides, with the same numbers."""
        one_sided = self.only_in_a or self.only_in_b or self.not_comparable
        return not one_sided and not any(t.max_abs or t.mismatched or t.differing for t in self.tensors)

    @property
    def identical(self) -> bool:
        """Whether A and B restore to the same bytes: tensors bit for bit, and everything else."""
        return self.tensors_equal and all(t.identical for t in self.tensors) and not self.rest_differs

    def __str__(self) -> str:
        return _diff_text(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        verdict = {"identical": self.identical, "tensors_equal": self.tensors_equal}
        document: dict[str, Any] = jsonable({**dataclasses.asdict(self), **verdict})
        return document


def jsonable(value: Any) -> Any:
    """The same value as JSON has it: text keys, lists, and text for NaN and infinities."""
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
    worst = worst_weight((t.role, t.error) for t in report.tensors)
    line += [words] if (words := asked(report.preset, report.asked, worst)) else []
    rows = []
    for (role, codec), group in _grouped(report.tensors, lambda t: (t.role, t.codec.partition("(")[0])):
        sizes = sum(t.bytes_before for t in group), sum(t.bytes_after for t in group)
        relative, steps = (
            _worst(t.error.get(figure) for t in group if t.error) for figure in ("relative_rms", "step_error")
        )
        rows.append(
            [
                role, codec, f"{len(group):,}", *map(size, sizes),
                "exact" if codec == "raw" else error(relative), percent(steps),
            ]
        )  # fmt: skip
    head = ["role", "codec", "tensors", "before", "after", "rel. rms", "step error"]
    return _joined(", ".join(line), table(head, rows, 2), report)


def _diff_text(report: DiffReport) -> str:
    """A row for each role, then the Adam update and what differs besides."""
    line = f"{report.b} against {report.a}: " + ("identical" if report.identical else "different")
    rows = []
    for (role,), group in _grouped(report.tensors, lambda t: (t.role,)):
        relative, largest, steps = (
            _worst(getattr(t, name) for t in group) for name in ("relative_rms", "max_abs", "step_error")
        )
        rows.append([role, f"{len(group):,}", error(relative), error(largest), percent(steps)])
    text = _joined(line, table(["role", "tensors", "rel. rms", "largest", "step error"], rows), report)
    rest = ", ".join(report.rest_differs[:5])
    values = [f"{v.name}: {v.a} in A, {v.b} in B" for v in report.values[:_NOTES]]
    return "\n".join([text, *([f"not tensors, and different: {rest}"] if rest else []), *values])


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest of the errors that are known; NaN, should there be any, wins."""
    errors = [value for value in values if value is not None]
    return max(errors, key=lambda v: math.inf if math.isnan(v) else v, default=None)


def _joined(line: str, rows: str, report: Report | DiffReport) -> str:
    promised = report.asked if isinstance(report, Report) else None
    errors = [" ".join(filter(None, words)) for words in step_errors(report.total, promised)]
    total = [f"step error: {', '.join(errors)}"] if errors else []
    notes = [f"note: {note}" for note in report.notes[:_NOTES]]
    more = [f"and {len(report.notes) - _NOTES} more notes"] if len(report.notes) > _NOTES else []
    return "\n".join([line, "", rows, "", *total, *notes, *more])


def _grouped(tensors: Iterable[_T], key: Callable[[_T], tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[_T]]]:
    groups: dict[tuple[str, ...], list[_T]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return sorted(groups.items())
