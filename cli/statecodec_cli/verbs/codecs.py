"""`statecodec codecs`: the number representations, changes and presets there are, and how to write them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from statecodec_cli import console, options

if TYPE_CHECKING:
    from rich.console import RenderableType


def run(as_json: options.AsJson = False) -> None:
    """List the codecs, the changes and the presets.

    Codecs with their fields and defaults, changes since a base with the codecs that they take, presets with their
    rules. A codec is written NAME or NAME(key=value,...) on the command line, in rules files and in Python.
    """
    from statecodec import choose, codecs

    document = {
        "codecs": [_describe(codecs.get(name)) for name in codecs.names()],
        "changes": [_describe_change(change) for change in codecs.Change],
        "presets": {name: _preset(preset) for name, preset in choose.PRESETS.items()},
    }
    if as_json:
        console.emit(document)
    else:
        console.show(*_tables(document))


def _tables(document: dict[str, Any]) -> list[RenderableType]:
    """The codecs with their fields, the changes with the codecs they take, then the presets with their rules."""
    from rich.text import Text

    from statecodec_cli.grid import Column, TextTable

    rows = []
    for codec in document["codecs"]:
        fields = ",".join(f"{name}={default}" for name, default in codec["fields"].items())
        rows.append((f"{codec['name']}({fields})" if fields else codec["name"], codec["summary"]))
    rows += [
        (f"{change['name']}(inner=...)", f"{change['summary']} inner: {', '.join(change['inner'])}")
        for change in document["changes"]
    ]
    heads = (Column("codec, with its defaults", text=True, gives="fold"), Column("what it is", text=True, gives="fold"))
    presets: list[RenderableType] = []
    for name, preset in document["presets"].items():
        presets.append(Text.assemble((f"preset {name}", "bold"), f"  {preset['about']}"))
        presets.extend(Text(f"  {rule}") for rule in preset["rules"])
    return [
        TextTable(heads, rows),
        *presets,
        Text("the first rule that matches wins; what none names stays exact", style="dim"),
    ]


def _describe(codec: Any) -> dict[str, Any]:
    """Name, version, fields and defaults of one codec class, and the first line of its module."""
    return {
        "name": codec.name,
        "version": codec.version,
        "summary": (inspect.getmodule(codec).__doc__ or "").strip().partition("\n")[0],
        "fields": {field.name: _written(getattr(codec(), field.name)) for field in dataclasses.fields(codec)},
    }


def _describe_change(change: Any) -> dict[str, Any]:
    """Name, what it is, and the codecs that it takes as `inner`."""
    from statecodec import codecs

    return {
        "name": change.value,
        "summary": change.summary,
        "inner": [codec.name for codec in codecs.INNER[change]],
    }


def _preset(preset: Any) -> dict[str, Any]:
    return {"about": preset.about, "errors": preset.budget.figures, "rules": [str(rule) for rule in preset.rules]}


def _written(value: Any) -> Any:
    """A default as `statecodec.codecs.parse` reads it."""
    from statecodec import codecs

    if isinstance(value, codecs.Codec):
        return codecs.format_codec(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value
