"""What can be asked of a checkpoint, as data: one row per operation and its options.

OPERATIONS drives `statecodec remote`, the HTTP service, its JSON schemas and its page. Each operation is the function
of that name in this package, each option one of its keywords. The module imports nothing but the errors, so that a
process without torch can read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from statecodec.errors import UsageError

Kind = Literal["choice", "flag", "number", "text", "texts"]
_TYPES: dict[Kind, str] = {
    "choice": "string",
    "flag": "boolean",
    "number": "number",
    "text": "string",
    "texts": "array",
}
_MOST_TEXTS, _LONGEST = 200, 500


@dataclass(frozen=True)
class Option:
    """One keyword of an operation.

    Args:
        name: The keyword.
        kind: What its value is; `texts` is a list of texts.
        help: One sentence, without the values that can be chosen.
        default: What the function takes when nothing is given.
        choices: Value -> what it means, for `choice`.
        above: Lower bound of a `number`, excluded.
        at_most: Upper bound of a `number`, included.
        pattern: What a text (each of `texts`) must match as a whole.
        example: A value to show.
        flag: Its name on the command line; by default the name with dashes.
        needed: Whether it must be given; for one of the operation's `one_of`, whether it may not be empty.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    choices: Mapping[str, str] | None = None
    above: float | None = None
    at_most: float | None = None
    pattern: str | None = None
    example: Any = None
    flag: str = ""
    needed: bool = False

    def accepted(self, value: Any) -> Any:
        """Check a value.

        Args:
            value: The value, as JSON has it.

        Returns:
            The value in the form that the function takes.

        Raises:
            UsageError: With a sentence that names the option.
        """
        if not self._accepts(value):
            raise UsageError(f"{self.name}: {_shown(value)} is not {self._wanted()}")
        return list(value) if self.kind == "texts" else value

    def schema(self) -> dict[str, Any]:
        """JSON schema of the value, with `title`, `default` and `examples` where there are any."""
        text: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _LONGEST}
        if self.pattern:
            text["pattern"] = f"^(?:{self.pattern})$"
        schema: dict[str, Any] = {"type": _TYPES[self.kind], "description": self.help}
        if self.kind == "choice":
            schema |= {"enum": list(self.choices or {}), "x-meanings": dict(self.choices or {})}
        elif self.kind == "text":
            schema |= text
        elif self.kind == "texts":
            schema |= {"items": text, "maxItems": _MOST_TEXTS} | ({"minItems": 1} if self.needed else {})
        elif self.kind == "number":
            schema |= {"exclusiveMinimum": self.above} if self.above is not None else {}
            schema |= {"maximum": self.at_most} if self.at_most is not None else {}
        schema |= {"default": self.default} if self.default not in (None, ()) else {}
        return schema | ({"examples": [self.example]} if self.example is not None else {})

    def _accepts(self, value: Any) -> bool:
        if self.kind == "flag":
            return isinstance(value, bool)
        if self.kind == "number":
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            return (
                real and (self.above is None or value > self.above) and (self.at_most is None or value <= self.at_most)
            )
        if self.kind == "choice":
            return isinstance(value, str) and value in (self.choices or {})
        if self.kind == "text":
            return self._matches(value)
        listed = isinstance(value, (list, tuple)) and int(self.needed) <= len(value) <= _MOST_TEXTS
        return listed and all(map(self._matches, value))

    def _matches(self, value: Any) -> bool:
        whole = isinstance(value, str) and 0 < len(value) <= _LONGEST
        return whole and (self.pattern is None or re.fullmatch(self.pattern, value) is not None)

    def _wanted(self) -> str:
        bounds = [f"above {self.above:g}"] if self.above is not None else []
        bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        expected = {
            "choice": "one of " + ", ".join(self.choices or {}),
            "flag": "true or false",
            "number": " ".join(["a number", " and ".join(bounds)]),
            "text": f"a text of 1 to {_LONGEST} characters",
            "texts": f"a list of at most {_MOST_TEXTS} texts of 1 to {_LONGEST} characters",
        }[self.kind]
        return expected + (f", such as {_shown(self.example)}" if self.example is not None else "")


@dataclass(frozen=True)
class Operation:
    """One function of the library, with the options that callers may choose.

    Args:
        name: The name of the function, of the verb of the command line, and in HTTP.
        summary: One sentence.
        options: Its keywords that a caller may choose.
        one_of: Names of options of which exactly one must be given.
        other: The keyword or parameter that takes a second checkpoint, if it takes one.
        other_help: What the second checkpoint is to it.
        other_needed: Whether the second checkpoint must be given.
        makes_files: Whether its result is a checkpoint; otherwise it is the report.
    """

    name: str
    summary: str
    options: tuple[Option, ...] = ()
    one_of: tuple[str, ...] = ()
    other: str | None = None
    other_help: str = ""
    other_needed: bool = False
    makes_files: bool = False

    def accepted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Check a caller's options.

        Args:
            values: Options by name; those that are None count as not given.

        Returns:
            The options in the form that the function takes.

        Raises:
            UsageError: For an unknown option, a missing one, or a wrong value.
        """
        options = {option.name: option for option in self.options}
        chosen = {name: value for name, value in values.items() if value is not None}
        for name in chosen:
            if name not in options:
                there = f"; there are {', '.join(options)}" if options else ""
                raise UsageError(f"{self.name} has no option {_shown(name)}{there}")
        for name in self._required:
            if name not in chosen:
                raise UsageError(f"{self.name} needs {name}: {options[name].help}")
        if self.one_of and sum(name in chosen for name in self.one_of) != 1:
            raise UsageError(f"{self.name} needs {' or '.join(self.one_of)}, one of them")
        return {name: options[name].accepted(value) for name, value in chosen.items()}

    def schema(self) -> dict[str, Any]:
        """JSON schema of the options as one object."""
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {option.name: option.schema() for option in self.options},
            "required": self._required,
            "additionalProperties": False,
        }
        return schema | ({"oneOf": [{"required": [name]} for name in self.one_of]} if self.one_of else {})

    @property
    def _required(self) -> list[str]:
        return [option.name for option in self.options if option.needed and option.name not in self.one_of]


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


PRESETS = {
    "lossless": "bit for bit the same file",
    "resume": "updates off by 1 % of an optimizer step, weights by 2 %: training goes on as before",
    "small": "10 % and 30 % of an optimizer step: smaller, at a small and reported cost",
    "tiny": "16 % and 64 % of an optimizer step: for keeping many",
    "live": "the form that the live optimizers hold: split weights, 8-bit moments",
    "weights": "moments dropped: training cannot resume",
}
_PRESET = Option("preset", "choice", "How small, at what error.", "resume", choices=PRESETS)
_RULES = Option(
    "rules", "texts", "PATTERN=CODEC, before the preset's own; the first match wins.", (),
    pattern=r"[^=]+=.+", example=["*.exp_avg_sq=companded(curve=log)"], flag="rule",
)  # fmt: skip
_PACK = Option(
    "pack",
    "text",
    "Entropy packing: none, zstd[:LEVEL], predicted (smaller, slower), auto (that for 16-bit moments and momenta).",
    "auto",
    pattern=r"none|(auto|zstd|predicted)(:-?[0-9]{1,2})?",
    example="zstd:9",
)
_SHARDS = Option(
    "max_shard_size", "text", "Split the output into files of at most this size.", "5GB",
    pattern=r"[1-9][0-9]{0,5} ?([KMGT]i?)?B", example="5GB",
)  # fmt: skip
_STEP = Option(
    "max_step_error", "number", "The error of weights and moments, as a fraction of one optimizer step.",
    above=0.0, at_most=1.0, example=0.01,
)  # fmt: skip
_UPDATE = Option(
    "max_update_error", "number", "The same for the moments alone.", above=0.0, at_most=1.0, example=0.01,
)  # fmt: skip
_WEIGHTS = Option(
    "max_weight_error", "number", "The same for the weights alone.", above=0.0, at_most=1.0, example=0.01,
)  # fmt: skip
_STRICT = Option("strict", "flag", "Refuse a rule that matches nothing, and what another layout cannot hold.", False)
_SHA256 = Option(
    "sha256", "flag", "Store the original's SHA-256; by default where everything is stored exactly (lossless).",
)  # fmt: skip
_SAFE = Option("safe_only", "flag", "Refuse a checkpoint whose unpickling could run code.", False)
_VERIFY = Option("verify", "flag", "Read the result back, check it, and measure the update.", False)
_SNR = Option("snr", "flag", "Signal-to-noise ratio of the second moments, per dimension.", True)
_CURVE = Option("curve", "flag", "Size against the error, in optimizer steps.", False)
_CUTOFF = Option("cutoff", "number", "Share only above this ratio; lower saves more.", 1.0, above=0.0, at_most=1e6)
_TO = Option(
    "to", "texts", "PATTERN=CODEC rules, or one of torch, adamw, foam, slimadam, lorapre.",
    example=["foam(level=2)"], needed=True,
)  # fmt: skip


@dataclass(frozen=True)
class LayoutChoice:
    """A layout that `convert` writes.

    Args:
        summary: One sentence.
        suffix: The ending of the name of the file or folder that it writes.
    """

    summary: str
    suffix: str


LAYOUTS = {
    "torch": LayoutChoice("one file of torch.save, with everything in it", ".pt"),
    "safetensors": LayoutChoice(
        "a safetensors file of all tensors, and beside it a JSON file of all other values", ".safetensors"
    ),
    "dcp": LayoutChoice("a folder of torch.distributed.checkpoint", ".dcp"),
    "zero-fp32": LayoutChoice("one file of torch.save with the fp32 parameters of a DeepSpeed ZeRO directory", ".pt"),
}
_LAYOUT = Option(
    "layout", "choice", "The files of another framework, with the same values.", None,
    {name: layout.summary for name, layout in LAYOUTS.items()}, needed=True,
)  # fmt: skip

OPERATIONS: dict[str, Operation] = {
    item.name: item
    for item in (
        Operation(
            "compress", "Make a checkpoint small.",
            (_PRESET, _RULES, _STEP, _UPDATE, _WEIGHTS, _VERIFY, _STRICT, _PACK, _SHARDS, _SHA256, _SAFE),
            other="base", other_help="the previous compressed checkpoint, to store only what changed since",
            makes_files=True,
        ),
        Operation(
            "restore", "Give the original file or folder back.", (_SAFE,),
            other="base", other_help="the compressed checkpoint that this one builds on", makes_files=True,
        ),
        Operation("inspect", "Say what is in a checkpoint, and what unpickling it would import.", (_SAFE,)),
        Operation("verify", "Check every checksum.", other="against", other_help="the original, to compare with"),
        Operation("diff", "Compare two checkpoints.", other="b", other_help="the second checkpoint", other_needed=True),
        Operation("analyze", "Measure what could be shared, and at what price.", (_SNR, _CURVE, _CUTOFF)),
        Operation(
            "convert", "Other codecs, another optimizer's state, or another framework's files.",
            (_TO, _LAYOUT, _PACK, _STRICT, _SAFE), one_of=("to", "layout"), makes_files=True,
        ),
    )
}  # fmt: skip
