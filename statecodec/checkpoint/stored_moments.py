"""Which stored moments belong together, in the document: columns, or rows in documents of format 1.x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from statecodec.checkpoint.json_columns import differences, integer, lists_of, summed
from statecodec.dtypes import DType
from statecodec.errors import FormatError
from statecodec.layouts import Moments
from statecodec.strict import Fields

_SETTINGS = ("beta1", "beta2", "eps", "lr", "weight_decay", "step")


class Named(Protocol):
    """An item with a name, a shape and a dtype."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...


def moments_to_json(moments: Sequence[Moments], numbers: Mapping[str, int]) -> Any:
    """Columns of item indices, and each combination of settings once."""
    if not moments:
        return []
    settings = [tuple(getattr(m, key) for key in _SETTINGS) for m in moments]
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(settings))}
    return {
        "param": [m.param for m in moments],
        "exp_avg": differences(numbers[m.exp_avg] for m in moments),
        "exp_avg_sq": differences(numbers[m.exp_avg_sq] for m in moments),
        "weight": differences(-1 if m.weight is None else numbers[m.weight] for m in moments),
        "settings": [list(kind) for kind in kinds],
        "kind": [kinds[kind] for kind in settings],
    }


def moments_from_json(fields: Fields, items: Sequence[Named]) -> Iterator[Moments]:
    """The inverse of `moments_to_json`, from untrusted JSON; rows are read as well. Raises FormatError."""
    value, where = fields.take("moments", (dict, list)), f"{fields.where}: moments"
    if isinstance(value, list):
        yield from (_moments_of(Fields(row, where).values, where) for row in value)
        return
    columns = Fields(value, where)
    settings = lists_of(columns.take("settings", list), len(_SETTINGS), where)
    params, kinds = columns.take("param", list), columns.take("kind", list)
    first, second = (summed(columns, key, 0, len(items) - 1, where) for key in ("exp_avg", "exp_avg_sq"))
    weights = summed(columns, "weight", -1, len(items) - 1, where)
    if len({len(column) for column in (params, kinds, first, second, weights)}) != 1:
        raise FormatError(f"{where}: columns of several lengths")
    for param, kind, m, v, w in zip(params, kinds, first, second, weights, strict=True):
        chosen = settings[integer(kind, 0, len(settings) - 1, where)]
        weight = None if w < 0 else items[w].name
        names = {"param": param, "exp_avg": items[m].name, "exp_avg_sq": items[v].name, "weight": weight}
        yield _moments_of({**names, **dict(zip(_SETTINGS, chosen, strict=True))}, where)


def _moments_of(value: Mapping[str, Any], where: str) -> Moments:
    number = {k: value.get(k) for k in _SETTINGS}
    text = {k: value.get(k) for k in ("param", "exp_avg", "exp_avg_sq", "weight")}
    optional = ("lr", "weight_decay", "step", "param", "weight")
    sound = {k: type(v) in (int, float) and abs(v) < 1e300 for k, v in number.items() if v is not None}
    if not all(sound.get(k, k in optional) for k in number):
        raise FormatError(f"{where}: a setting is not a number")
    if not all(isinstance(v, str) or (v is None and k in optional) for k, v in text.items()):
        raise FormatError(f"{where}: a name is not text")
    return Moments(**cast(Any, text), **cast(Any, number))
