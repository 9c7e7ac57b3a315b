"""`statecodec codecs`: the number representations and presets there are, and how to write them."""

from __future__ import annotations

import dataclasses
from typing import Any

from statecodec_cli import console, options


def run(as_json: options.AsJson = False) -> None:
    """List the codecs, their fields and defaults, and what each preset does.

    A codec is written NAME or NAME(key=value,...) on the command line, in rules files and in Python.
    """
    from statecodec import codecs, policy
    from statecodec_cli import tables

    document = {
        "codecs": [_describe(codecs.get(name)) for name in codecs.names()],
        "presets": {name: list(rules) for name, rules in policy.PRESETS.items()},
    }
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.codecs(document))


def _describe(codec: Any) -> dict[str, Any]:
    """Name, version, first docstring line and fields of one codec class."""
    return {
        "name": codec.name,
        "version": codec.version,
        "summary": (codec.__doc__ or "").strip().partition("\n")[0],
        "fields": {field.name: _default(field) for field in dataclasses.fields(codec)},
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
