"""The option tables of docs/cli.md, written from the verbs themselves by `make docs`; a test compares them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from statecodec_cli.main import VERBS

_BLOCK = re.compile(r"(<!-- options: (?P<verb>[a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Parameter = tuple[ArgumentInfo | OptionInfo, Any, Any]  # what typer is told, the type, the default


def parameters(run: Callable[..., None]) -> list[Parameter]:
    """The arguments and options of a verb, in the order of its signature."""
    hints = get_type_hints(run, include_extras=True)
    rows = []
    for name, parameter in inspect.signature(run).parameters.items():
        kind, info = get_args(hints[name])[:2]
        rows.append((info, kind, parameter.default))
    return rows


def options(verb: str) -> str:
    """One verb's usage line and options as Markdown."""
    declared = parameters(VERBS[verb])
    arguments = [str(info.metavar) for info, *_ in declared if isinstance(info, ArgumentInfo)]
    rows = [(_spelled(info, kind), _explained(info, default)) for info, kind, default in declared]
    usage = " ".join(["statecodec", verb, *arguments, "[OPTIONS]"])
    lines = ["```text", usage, "```", "", "| argument or option | meaning |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {left} | {right} |" for left, right in rows)]) + "\n"


def rewrite(text: str) -> str:
    """The document with every marked block brought up to date."""
    return _BLOCK.sub(lambda match: f"{match[1]}{options(match['verb'])}{match[3]}", text)


def _spelled(option: ArgumentInfo | OptionInfo, kind: Any) -> str:
    if isinstance(option, ArgumentInfo):
        return f"`{option.metavar}`"
    value = "" if kind in (bool, bool | None) else f" {option.metavar or _value(kind)}"
    spellings = [
        option.default,
        *(option.param_decls or ()),
    ]  # inside Annotated, typer keeps the first one as the default
    return ", ".join(f"`{spelling}{value}`" for spelling in spellings).replace("|", "\\|")


def _value(kind: Any) -> str:
    return "|".join(get_args(kind)) if get_origin(kind) is Literal else "N"


def _explained(option: ArgumentInfo | OptionInfo, default: Any) -> str:
    shown = "" if option.show_default is False or isinstance(default, bool) else f" Default: `{default}`."
    return f"{option.help}{shown}"


def main() -> None:
    """Rewrite the files named on the command line."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewrite(path.read_text()))


if __name__ == "__main__":
    main()
