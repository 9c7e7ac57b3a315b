"""Writing a codec as text: NAME or NAME(key=value,...), nested where a field is a codec.

companded(curve=log,bits=8,group=128)      shared(dims=[0,1])      folded(level=2,inner=companded(bits=4))
uniform(step=1.52587890625e-05)            a float is written so that it reads back to the very bits
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from statecodec.codecs.base import Codec
from statecodec.codecs.cast import Cast
from statecodec.codecs.changes import Change
from statecodec.codecs.companded import Companded
from statecodec.codecs.direction import Direction
from statecodec.codecs.dropped import Dropped
from statecodec.codecs.folded import Folded
from statecodec.codecs.following import Following
from statecodec.codecs.logarithmic import Logarithmic
from statecodec.codecs.lowrank import LowRank
from statecodec.codecs.raw import Raw
from statecodec.codecs.same import Same
from statecodec.codecs.shared import Shared
from statecodec.codecs.split import Split
from statecodec.codecs.ulps import Ulps
from statecodec.codecs.uniform import Uniform
from statecodec.errors import InvalidCodec, UnknownCodec, UnsupportedVersion

CODECS: dict[str, type[Codec]] = {
    c.name: c
    for c in (
        Raw, Uniform, Direction, Logarithmic, Following, Split, Ulps, Same, Cast, Companded, Folded, Shared, LowRank,
        Dropped,
    )
}  # fmt: skip

_CHANGES = {change.value for change in Change}
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_TOKEN = re.compile(rf"\s*([A-Za-z_][A-Za-z0-9_]*|{_NUMBER}|[()\[\],=])")
_MAX_DEPTH = 4


def names() -> list[str]:
    """Names of all codecs."""
    return list(CODECS)


def get(name: str) -> type[Codec]:
    """Look up a codec class.

    Args:
        name: Its name.

    Returns:
        The class.

    Raises:
        UnknownCodec: If there is none of that name.
        InvalidCodec: For the name of a change, such as `delta`.
    """
    if name in _CHANGES:
        raise InvalidCodec(
            f"{name} is no codec: it says what changed of a whole tensor since a base checkpoint, in a rule of "
            "`compress --base`"
        )
    if name not in CODECS:
        raise UnknownCodec(f"no codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]


def parse(text: str) -> Codec:
    """Make a codec from its text.

    Args:
        text: `NAME` or `NAME(key=value,...)`, nested where a field is a codec.

    Returns:
        The codec.

    Raises:
        UnknownCodec: If there is no codec of that name.
        InvalidCodec: If the text cannot be read, or a field is unknown or out of its range.
        UnsupportedVersion: If the text states a version that is not known here.

    Example:
        >>> parse("folded(level=2,inner=companded(bits=4))").inner.bits
        4
    """
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise InvalidCodec(f"codec {text!r}: unexpected {text[position:].strip()[:10]!r}")
        tokens.append(match.group(1))
        position = match.end()
    codec = _parse_codec(tokens, text, 0)
    if tokens:
        raise InvalidCodec(f"codec {text!r}: nothing may follow {format_codec(codec)}")
    return codec


def format_codec(codec: Codec) -> str:
    """Write a codec as text.

    Args:
        codec: The codec.

    Returns:
        The shortest text that `parse` turns into this codec: fields at their defaults are left out.

    Example:
        >>> format_codec(parse("companded(curve=log,bits=8)"))
        'companded(curve=log)'
    """
    shown = []
    for f in dataclasses.fields(codec):
        value = getattr(codec, f.name)
        if value != _default(f):
            shown.append(f"{f.name}={_format_value(value)}")
    return f"{codec.name}({','.join(shown)})" if shown else codec.name


def described(codec: Codec) -> str:
    """The text of a codec with its version and every field, for files that are kept.

    `parse` reads it as long as it knows the version, whatever the defaults are by then.
    """
    fields = {f.name: getattr(codec, f.name) for f in dataclasses.fields(codec)}
    values = {k: described(v) if isinstance(v, Codec) else _format_value(v) for k, v in fields.items()}
    return f"{codec.name}({','.join(f'{k}={v}' for k, v in {'version': str(codec.version), **values}.items())})"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def from_config(config: Mapping[str, Any]) -> Codec:
    """Make a codec from its JSON config, which is not trusted.

    Args:
        config: What `Codec.config` gave.

    Returns:
        The codec.

    Raises:
        UnknownCodec: If there is no codec of that name.
        InvalidCodec: If a field is unknown or out of its range.
        UnsupportedVersion: If it is of a version that is not known here.
    """
    return _from_config(config, 0)


def _from_config(config: object, depth: int) -> Codec:
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str) or depth > _MAX_DEPTH:
        raise InvalidCodec(f"a codec config is an object with a name, not {str(config)[:80]!r}")
    kind = get(config["name"])
    fields = _current(kind, {k: v for k, v in config.items() if k != "name"})
    return _build(kind, {k: _from_config(v, depth + 1) if isinstance(v, Mapping) else v for k, v in fields.items()})


def _current(kind: type[Codec], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config, as the version of the codec here has them. Raises UnsupportedVersion."""
    fields = {k: v for k, v in config.items() if k != "version"}
    version = config.get("version", kind.version)
    numbered = type(version) is int  # a tensor would compare element by element
    if numbered and version == kind.version:
        return fields
    upgraded = kind.upgraded(version, fields) if numbered else None
    if upgraded is None:
        raise UnsupportedVersion(
            f"codec {kind.name} version {str(version)[:40]}: this reader knows {kind.version} and earlier"
        )
    return upgraded


def _build(kind: type[Codec], values: Mapping[str, Any]) -> Codec:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            expected = ", ".join(fields) or "none"
            raise InvalidCodec(f"{kind.name} has no field {key!r}; its fields are: {expected}")
        if not _fits(_annotation(fields[key]), value):
            raise InvalidCodec(f"{kind.name}: {key}={str(value)[:40]} is not {fields[key].type}")
    return kind(**{k: _plain(str(fields[k].type), v) for k, v in values.items()})


def _plain(annotation: str, value: Any) -> Any:
    """The value as the field holds it: lists as tuples, whole numbers of a float field as floats."""
    if annotation == "float":
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _annotation(field: dataclasses.Field[Any]) -> str:
    """A field's type as it is written, with or without `from __future__ import annotations`."""
    return field.type if isinstance(field.type, str) else field.type.__name__


def _fits(annotation: str, value: object) -> bool:
    if annotation == "int":
        return type(value) is int
    if annotation == "float":
        # The bound comes first: an integer may be too large for a float.
        return type(value) in (int, float) and abs(value) < 2**1023 and math.isfinite(value)  # type: ignore[arg-type]
    if annotation == "str":
        return isinstance(value, str)
    if annotation == "tuple[int, ...]":
        return isinstance(value, list | tuple) and all(type(v) is int for v in value)
    return isinstance(value, Codec)


def _parse_codec(tokens: list[str], text: str, depth: int) -> Codec:
    name = _take(tokens, text)
    kind = get(name)
    values: dict[str, Any] = {}
    if tokens and tokens[0] == "(":
        tokens.pop(0)
        while tokens and tokens[0] != ")":
            key = _take(tokens, text)
            _expect(tokens, "=", text)
            values[key] = _parse_value(tokens, text, depth + 1)
            if tokens and tokens[0] == ",":
                tokens.pop(0)
            elif tokens and tokens[0] != ")":
                raise InvalidCodec(f"codec {text!r}: expected ',' or ')', found {tokens[0]!r}")
        _expect(tokens, ")", text)
    if "dims" in values and isinstance(values["dims"], int):
        values["dims"] = (values["dims"],)
    return _build(kind, _current(kind, values))


def _parse_value(tokens: list[str], text: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InvalidCodec(f"codec {text!r} is nested too deeply")
    if tokens and tokens[0] == "[":
        tokens.pop(0)
        numbers = []
        while tokens and tokens[0] != "]":
            numbers.append(_number(_take(tokens, text), text))
            if tokens and tokens[0] == ",":
                tokens.pop(0)
        _expect(tokens, "]", text)
        return tuple(numbers)
    if tokens and (tokens[0] in CODECS or tokens[0] in _CHANGES or (len(tokens) > 1 and tokens[1] == "(")):
        return _parse_codec(tokens, text, depth)
    word = _take(tokens, text)
    return _number(word, text) if re.fullmatch(_NUMBER, word) else word


def _number(word: str, text: str) -> int | float:
    if re.fullmatch(r"-?\d{1,9}", word):
        return int(word)
    if len(word) > 40 or re.fullmatch(r"-?\d+", word):
        raise InvalidCodec(f"codec {text!r}: {word[:60]!r} is not a number of at most nine digits, or 40 with a point")
    return float(word)


def _take(tokens: list[str], text: str) -> str:
    if not tokens or not re.fullmatch(rf"[A-Za-z_]\w*|{_NUMBER}", tokens[0]):
        raise InvalidCodec(f"codec {text!r}: expected a name or number, found {tokens[0] if tokens else 'the end'!r}")
    return tokens.pop(0)


def _expect(tokens: list[str], token: str, text: str) -> None:
    if not tokens or tokens[0] != token:
        raise InvalidCodec(f"codec {text!r}: expected {token!r}, found {tokens[0] if tokens else 'the end'!r}")
    tokens.pop(0)


def _format_value(value: object) -> str:
    if isinstance(value, Codec):
        return format_codec(value)
    if isinstance(value, tuple):
        return f"[{','.join(str(v) for v in value)}]"
    return repr(value) if isinstance(value, float) else str(value)
