"""From SNRs to rules: per layer, or averaged over depth per layer type, so that they fit another depth and width.

One rules file serves `compress --rules` (through `role` and `codec`) and `statecodec.optim.SlimAdam` (through `dims`):

    {"rules": [{"pattern": "h.*.attn.v_proj.weight", "role": "exp_avg_sq", "dims": [0], "codec": "shared(dims=[0])",
    "snr": 2.2}]}
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from statecodec import atomic
from statecodec.choose.architectures import Layer, layer_type, recognise
from statecodec.choose.snr import CUTOFF, Dims, LayerSNR, Ratios, average, choose, cutoffs, saved
from statecodec.errors import PolicyError

BASIS = ("layer", "type", "table")
_COLUMNS = ("key", "shape", "compress_dims", "snr")
_NUMBERS = re.compile(r"[(\[]\s*(\d+(?:\s*,\s*\d+)*)?\s*,?\s*[)\]]")
_MAX_TABLE_BYTES = 1 << 30


def chosen(layers: Sequence[LayerSNR], cutoff: float = CUTOFF, basis: str = "layer") -> dict[str, Dims]:
    """The dimensions to share, by name; () keeps all values.

    `layer`: each by its own SNRs. `type`: by the SNRs averaged over all layers of its type (`h.*.attn.v_proj.weight`).
    `table`: the paper's recommendation for recognised layers, whatever was measured. Raises PolicyError.
    """
    if basis == "layer":
        return {layer.name: layer.dims(cutoff) for layer in layers}
    if basis == "type":
        by_type = {kind: _type_dims(group, cutoff) for kind, group in types(layers).items()}
        return {layer.name: by_type[_type_key(layer)] for layer in layers}
    if basis == "table":
        recognised = recognise({layer.name: layer.shape for layer in layers})
        return {layer.name: recognised[layer.name].recommended or () for layer in layers}
    raise PolicyError(f"rules by {basis!r}: expected one of {', '.join(BASIS)}")


def types(layers: Sequence[LayerSNR]) -> dict[str, list[LayerSNR]]:
    """Layers by type: equal names but for layer numbers, and as many dimensions."""
    by_type: dict[str, list[LayerSNR]] = {}
    for layer in layers:
        by_type.setdefault(_type_key(layer), []).append(layer)
    return by_type


def depth_average(group: Sequence[LayerSNR]) -> Ratios:
    """The SNRs of a layer type: the mean over its layers."""
    return average(layer.ratios for layer in group)


def saved_curve(layers: Sequence[LayerSNR], basis: str = "layer", points: int = 200) -> list[tuple[float, float]]:
    """(cutoff, share of second moments saved), from cutoff 0 to where nothing is shared any more."""
    at = cutoffs(layers)
    step = max(1, len(at) // points)
    return [(c, saved(layers, chosen(layers, c, basis))) for c in sorted({*at[::step], at[-1], CUTOFF})]


def rules_document(layers: Sequence[LayerSNR], cutoff: float = CUTOFF, basis: str = "type") -> dict[str, Any]:
    """The content of a rules file.

    Layers that share nothing are listed with no dims, so that the file says what was decided.
    """
    dims = chosen(layers, cutoff, basis)
    if basis == "layer":
        entries = [_entry(_escape(x.name), dims[x.name], x.ratios) for x in layers if x.shareable]
    else:
        entries = [
            _entry(_pattern(key, group), dims[group[0].name], depth_average(group))
            for key, group in types(layers).items()
            if group[0].shareable
        ]
    entries.sort(key=lambda entry: -sum(c not in "*[]" for c in entry["pattern"]))
    entries = [*_exceptions(layers, dims, entries), *entries]
    return {"cutoff": cutoff, "basis": basis, "saved": saved(layers, dims), "rules": entries}


def write_rules(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a rules file, whole or not at all; an existing one is replaced. Raises UsageError, OutputFailed."""
    text = json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"
    atomic.write_file(path, text.encode("utf-8"), force=True)


def read_table(path: str | Path) -> list[LayerSNR]:
    """SNRs from a CSV table with the columns key, shape, compress_dims and snr. Raises PolicyError.

    They are averaged over the table's other columns, such as step. The SNR data published with SlimAdam has that form
    (github.com/dayal-kalra/low-memory-adam, snr_data): one row per step, parameter and subset of dimensions, the last
    two written as tuples.
    """
    path = Path(path)
    rows: dict[str, tuple[tuple[int, ...], dict[Dims, list[float]]]] = {}
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise PolicyError(f"{path}: larger than {_MAX_TABLE_BYTES} bytes")
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = [c for c in _COLUMNS if c not in (table.fieldnames or ())]
            if missing:
                raise PolicyError(
                    f"{path}: an SNR table has the columns {', '.join(_COLUMNS)}; {', '.join(missing)} missing"
                )
            for number, row in enumerate(table, 2):
                _read_row(row, rows, f"{path}, line {number}")
    except (OSError, UnicodeError, csv.Error) as error:
        raise PolicyError(f"{path}: {error}") from error
    if not rows:
        raise PolicyError(f"{path}: the SNR table is empty")
    shapes = {name: shape for name, (shape, _) in rows.items()}
    layers = recognise(shapes)
    return [
        LayerSNR(
            name,
            shape,
            average(dict(zip(ratios, row, strict=True)) for row in _rows(ratios)),
            shareable(layers[name]),
        )
        for name, (shape, ratios) in rows.items()
    ]


def shareable(layer: Layer) -> bool:
    """Whether SNR rules may share a layer: not vectors (biases), not norms."""
    return layer.shareable


def _rows(ratios: Mapping[Dims, list[float]]) -> Iterable[list[float]]:
    longest = max(len(values) for values in ratios.values())
    padded = [values + [math.nan] * (longest - len(values)) for values in ratios.values()]
    return ([values[i] for values in padded] for i in range(longest))


def _read_row(row: Mapping[str, Any], rows: dict[str, Any], where: str) -> None:
    try:
        name, shape, dims, ratio = (
            str(row["key"]),
            _integers(row["shape"]),
            _integers(row["compress_dims"]),
            float(row["snr"]),
        )
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{where}: {error}") from error
    if not dims or dims[-1] >= len(shape) or list(dims) != sorted(set(dims)):
        raise PolicyError(f"{where}: dimensions {list(dims)} of shape {list(shape)}")
    ratios_of = rows.setdefault(name, (shape, {}))
    if ratios_of[0] != shape:
        raise PolicyError(f"{where}: {name} had shape {list(ratios_of[0])} before, {list(shape)} here")
    ratios_of[1].setdefault(dims, []).append(ratio)


def _integers(text: str | None) -> tuple[int, ...]:
    match = _NUMBERS.fullmatch((text or "").strip())
    if match is None:
        raise ValueError(f"expected numbers in brackets, like (768, 3072), found {str(text)[:40]!r}")
    return tuple(int(n) for n in match.group(1).split(",")) if match.group(1) else ()


def _type_key(layer: LayerSNR) -> str:
    return f"{layer_type(layer.name)} {len(layer.shape)}"


def _type_dims(group: Sequence[LayerSNR], cutoff: float) -> Dims:
    # All layers of a type have one number of dimensions; widths may differ (grouped layers), the first decides on ties.
    return choose(depth_average(group), group[0].shape, cutoff) if group[0].shareable else ()


def _pattern(key: str, group: Sequence[LayerSNR]) -> str:
    """A shell pattern for a type: `*` where the numbers stood; a name without numbers stays itself."""
    name = key.rsplit(" ", 1)[0]
    if name == group[0].name:
        return _escape(name)
    return ".".join("*" if word == "*" else _escape(word) for word in name.split("."))


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _entry(pattern: str, dims: Dims, ratios: Mapping[Dims, float]) -> dict[str, Any]:
    codec = f"shared(dims=[{','.join(map(str, dims))}])" if dims else None
    entry: dict[str, Any] = {"pattern": pattern, "role": "exp_avg_sq", "dims": list(dims), "codec": codec}
    best = ratios.get(dims) if dims else max((r for r in ratios.values() if not math.isnan(r)), default=None)
    return entry if best is None else {**entry, "snr": best}


def _exceptions(
    layers: Sequence[LayerSNR], dims: Mapping[str, Dims], entries: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rules for single layers that the patterns, first match wins, would decide differently than was chosen."""
    exceptions = []
    for layer in layers:
        first = next((e for e in entries if fnmatchcase(layer.name, e["pattern"])), None)
        if layer.shareable and first is not None and tuple(first["dims"]) != dims[layer.name]:
            exceptions.append(_entry(_escape(layer.name), dims[layer.name], layer.ratios))
    return exceptions


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
