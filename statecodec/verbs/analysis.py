"""The result of `analyze`: SNRs of the second moments, rules that follow from them, and size against step error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statecodec.checkpoint.report import jsonable
from statecodec.choose.curve import CurvePoint
from statecodec.choose.snr import LayerSNR, Ratios, saved
from statecodec.choose.snr_rules import BASIS, chosen, rules_document, saved_curve, write_rules
from statecodec.errors import UsageError
from statecodec.figures import percent, table


@dataclass(frozen=True)
class TensorSNR:
    """One second moment: what it is, its averaged SNRs, and what follows from them.

    Args:
        name: The parameter's name.
        kind: The kind of layer that its name and shape were recognised as.
        shape: Its shape.
        ratios: SNR by dimensions.
        dims: The dimensions to share by its own SNRs; () for none.
        type_dims: Those by the mean over the layers of its type.
        recommended: The paper's advice for its kind; None for no advice.
        parts: SNRs of q, k and v inside a fused projection, which can only be shared as one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ratios: Ratios
    dims: tuple[int, ...]
    type_dims: tuple[int, ...]
    recommended: tuple[int, ...] | None
    parts: Mapping[str, Ratios]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; dimensions are joined by commas where they are keys."""
        return {
            "name": self.name, "kind": self.kind, "shape": list(self.shape), "snr": _keyed(self.ratios),
            "dims": list(self.dims), "type_dims": list(self.type_dims),
            "recommended": None if self.recommended is None else list(self.recommended),
            "parts": {name: _keyed(ratios) for name, ratios in self.parts.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """What `analyze` measured. Fields are empty where they were not asked for.

    Args:
        sources: The checkpoints or tables.
        steps: The optimizer step of each checkpoint; None where it does not say.
        cutoff: The SNR above which dimensions are shared.
        tensors: The second moments, with their SNRs and what follows from them.
        layers: The same layers as the rules take them.
        curve: Size against error.
        notes: What was left out, and why.
        seconds: How long it took.
        update_error: What sharing by the rules by `layer`, by `type` and by the paper's `table` does to the Adam update
            of the last checkpoint: ||u' - u|| / ||u||. Empty where there are no pairs of moments.
    """

    sources: tuple[str, ...]
    steps: tuple[float | None, ...]
    cutoff: float
    tensors: tuple[TensorSNR, ...] = ()
    layers: tuple[LayerSNR, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    update_error: Mapping[str, float] = field(default_factory=dict)

    @property
    def saved(self) -> dict[str, float]:
        """Share of the second moments saved at the cutoff, by the rules by `layer`, `type` and `table`."""
        return {basis: saved(self.layers, chosen(self.layers, self.cutoff, basis)) for basis in BASIS}

    @property
    def saved_curve(self) -> list[tuple[float, float]]:
        """(cutoff, share saved by per-layer rules)."""
        return saved_curve(self.layers) if self.layers else []

    def __str__(self) -> str:
        lines = [f"{', '.join(self.sources)}: {len(self.tensors)} second moments"]
        dims = sorted({d for t in self.tensors for d in t.ratios}, key=lambda d: (len(d), d))
        rows = [
            [t.name, t.kind, *(f"{t.ratios[d]:.3g}" if d in t.ratios else "" for d in dims), ",".join(map(str, t.dims))]
            for t in self.tensors
        ]
        if rows:
            over = [f"over {','.join(map(str, d))}" for d in dims]
            lines.append(table(["tensor", "kind", *over, "share"], rows, 2))
            lines += [
                f"rules by {basis}: {100 * share:.1f} % saved"
                + (f", step error: update {percent(self.update_error[basis])}" if basis in self.update_error else "")
                for basis, share in self.saved.items()
            ]
        if self.curve:
            points = [
                [percent(p.step_error), percent(p.weight_step_error), f"{p.bytes_per_param:.3f}", p.label or ""]
                for p in self.curve
            ]
            lines.append(table(["update, of a step", "weights, of a step", "B/param", "preset"], points, 0))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def rules(self, basis: str = "type", cutoff: float | None = None) -> dict[str, Any]:
        """Make the content of a rules file.

        Args:
            basis: `layer` (each by its own SNRs, for this model alone), `type` (by the mean over layers of a type, for
                other depths and widths as well) or `table` (the paper's advice).
            cutoff: Another cutoff than that of the analysis.

        Returns:
            A dict that JSON can hold: `{"rules": [{"pattern", "role", "dims", "codec", "snr"}, ...]}`.

        Raises:
            PolicyError: For another basis.
        """
        return rules_document(self.layers, self.cutoff if cutoff is None else cutoff, basis)

    def save_rules(self, path: str | Path, basis: str = "type") -> None:
        """Write a rules file for `compress(rules_file=...)` and for SlimAdam.

        Args:
            path: The file.
            basis: As for `rules`.

        Raises:
            UsageError: If no SNR was measured.
            PolicyError: For another basis.
        """
        if not self.layers:
            raise UsageError("there are no second moments to make rules of")
        write_rules(self.rules(basis), path)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = jsonable({
            "sources": list(self.sources), "steps": list(self.steps), "cutoff": self.cutoff,
            "saved": self.saved if self.layers else None,
            "update_error": dict(self.update_error) if self.update_error else None,
            "saved_curve": self.saved_curve, "tensors": [t.to_json() for t in self.tensors],
            "curve": [p.to_json() for p in self.curve], "notes": list(self.notes), "seconds": self.seconds,
        })  # fmt: skip
        return plain


def _keyed(ratios: Ratios) -> dict[str, float]:
    return {",".join(map(str, dims)): ratio for dims, ratio in ratios.items()}
