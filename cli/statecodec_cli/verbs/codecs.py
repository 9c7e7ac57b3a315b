"""`statecodec codecs`: the number representations and presets there are, and how to write them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from statecodec_cli import console, options


def run(as_json: options.AsJson = False) -> None:
    """List the codecs, their fields and defaults, and what each preset does.

    A codec is written NAME or NAME(key=value,...) on the command line, in rules files and in Python.
    """
    from statecodec import choose, codecs
    from statecodec_cli import tables

    document = {
        "codecs": [_describe(codecs.get(name)) for name in codecs.names()],
        "presets": {name: list(rules) for name, rules in choose.PRESETS.items()},
    }
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.codecs(document))


def _describe(codec: Any) -> dict[str, Any]:
    """Name, version, fields and defaults of one codec class, and the first line of its module."""
    return {
        "name": codec.name,
        "version": codec.version,
        "summary": (inspect.getmodule(codec).__doc__ or "").strip().partition("\n")[0],
        "fields": {field.name: _written(getattr(codec(), field.name)) for field in dataclasses.fields(codec)},
    }


def _written(value: Any) -> Any:
    """A default as `statecodec.codecs.parse` reads it."""
    from statecodec import codecs

    if isinstance(value, codecs.Codec):
        return codecs.format_codec(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value
