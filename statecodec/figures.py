"""How sizes, ratios, durations and errors are written, and plain tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from statecodec.roles import family

_STEP_ERRORS = (
    ("update", "u_rms", "u_rms"),
    ("momenta", "momentum_step_error", "u_rms"),
    ("weights", "weight_step_error", "weight_step_error"),
)
"""What is off, and the names of its error in a report's `total` and in `asked`."""


def size(nbytes: float) -> str:
    """Decimal units, three significant figures: 999 B, 12.3 kB, 4.56 GB."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    value = float(nbytes)
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{figures(value)} {units[0]}"


def figures(value: float) -> str:
    """Three significant figures without an exponent: 0.123, 1.23, 12.3, 123."""
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"


def ratio(before: float, after: float) -> str:
    """How many times smaller: 2.94x."""
    return f"{before / after:.2f}x" if after else "-"


def seconds(value: float) -> str:
    """A duration: 0.42 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def error(value: Any) -> str:
    """An error figure: `exact` for zero, three significant figures from a thousandth on, else two and an exponent."""
    if value is None:
        return ""
    number = float(value)
    if number == 0:
        return "exact"
    return f"{number:#.3g}".rstrip(".") if 1e-3 <= abs(number) < 1e3 else f"{number:.1e}"


def percent(value: Any) -> str:
    """A fraction of an optimizer step, as it is written everywhere: `exact` for zero, else per cent.

    >>> percent(0.00993), percent(0.5), percent(0.0)
    ('0.993 %', '50 %', 'exact')
    """
    if value is None:
        return ""
    number = 100 * float(value)
    if not math.isfinite(number):
        return str(number)
    if number == 0:
        return "exact"
    return f"{number:.0f} %" if 999.5 <= abs(number) < 1e6 else f"{number:.3g} %"


def step_errors(
    total: Mapping[str, Any] | None, asked: Mapping[str, float] | None = None
) -> list[tuple[str, str, str]]:
    """The errors over all tensors in optimizer steps: what is off, by how much, and by how much it may be.

    >>> step_errors({"u_rms": 0.0098, "weight_step_error": 0.0199, "cosine": 1.0}, {"u_rms": 0.01})
    [('update', '0.98 %', '(asked 1 %)'), ('weights', '1.99 %', '')]
    """
    measured, promised = total or {}, asked or {}
    found = []
    for name, key, bound in _STEP_ERRORS:
        if measured.get(key) is not None:
            most = promised.get(bound)
            found.append((name, percent(measured[key]), f"(asked {percent(most)})" if most else ""))
    return found


def asked(preset: str | None, errors: Mapping[str, float] | None, weights_at: float | None = None) -> str:
    """The errors that a file was made to keep to (see `Report.asked`), in words; "" where they are not known.

    >>> asked("resume", {"u_rms": 0.01, "weight_step_error": 0.02})
    'preset resume, updates off by up to 1 % of a step, weights off by up to 2 % of a step'
    >>> asked(None, {"u_rms": 0.05, "weight_step_error": 0.003})
    'updates off by up to 5 % of a step, weights off by up to 0.3 % of a step'

    `weights_at` is the largest error of a weight, in its steps. It is above what was asked for where 24 bits, the
    finest that is stored, are coarser than that.

    >>> asked("resume", {"u_rms": 0.01, "weight_step_error": 0.01}, 0.26)
    'preset resume, errors up to 1 % of a step, but weights in 24 bits up to 26 %'
    """
    if errors is None:
        return ""
    update, weights = errors.get("u_rms"), errors.get("weight_step_error")
    halves = [("errors", update)] if update == weights else [("updates off by", update), ("weights off by", weights)]
    words = [f"{label} up to {percent(most)} of a step" for label, most in halves if most]
    if weights and weights_at and weights_at > 1.01 * weights:
        words.append(f"but weights in 24 bits up to {percent(weights_at)}")
    return ", ".join([*([f"preset {preset}"] if preset else []), *words])


def worst_weight(errors: Iterable[tuple[str, Mapping[str, float] | None]]) -> float | None:
    """The largest error of a weight in its steps, of tensors' roles and errors (see `TensorReport.error`)."""
    of_weights = [error for role, error in errors if error and family(role) == "weight"]
    return max((error["step_error"] for error in of_weights if "step_error" in error), default=None)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """Columns two spaces apart, the first `text` of them to the left, figures to the right.

    >>> print(table(["role", "size"], [["weight", "3 B"], ["step", "12 kB"]]))
    role     size
    weight    3 B
    step    12 kB
    """
    every = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    lines = []
    for row in every:
        cells = [
            cell.ljust(width) if i < text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
