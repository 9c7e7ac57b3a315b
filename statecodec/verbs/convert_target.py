"""The text that says what `convert` converts an optimizer's state to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from statecodec.errors import UsageError
from statecodec.operations import LAYOUTS

_NAMES = ("torch", "adamw", "foam", "slimadam", "lorapre")
_TARGET = re.compile(rf"({'|'.join(_NAMES)})\s*(?:\((.*)\))?", re.DOTALL)
_OPENED = re.compile(rf"\s*({'|'.join(_NAMES)})\s*\(")
_OPTION = re.compile(r"\s*(\w+)\s*=\s*([^,()\[\]]*)\s*(?:,|$)")


@dataclass(frozen=True)
class Target:
    """What to convert an optimizer's state to: `torch`, or one of our optimizers with constructor options."""

    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Target | None:
        """`foam(level=2)`, `slimadam(rules=rules.json)`, `lorapre(rank=16)`, `adamw(moments=companded8)`, `torch`.

        None for text that is a rule (PATTERN=CODEC). Raises UsageError for text that is neither, and for options that
        cannot be read.
        """
        match = _TARGET.fullmatch(text.strip())
        if match is None:
            if _OPENED.match(text):
                raise UsageError(f"{text!r}: expected NAME(option=value,...), and nothing behind the closing bracket")
            if "=" not in text:
                layout = f"; {text} is a layout (--layout {text})" if text in LAYOUTS else ""
                raise UsageError(
                    f"to {text!r:.40}: expected an optimizer ({', '.join(_NAMES)}) or a rule PATTERN=CODEC{layout}"
                )
            return None
        arguments, position, options = match.group(2) or "", 0, {}
        while position < len(arguments):
            option = _OPTION.match(arguments, position)
            if option is None:
                raise UsageError(f"{text!r}: expected NAME(option=value,...), stuck at {arguments[position:][:40]!r}")
            options[option.group(1)] = _value(option.group(2).strip())
            position = option.end()
        if match.group(1) == "torch" and options:
            raise UsageError("torch takes no options")
        return cls(match.group(1), options)


def _value(text: str) -> Any:
    if text in ("True", "False", "true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"-?\d{1,9}", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return None if text == "None" else text
