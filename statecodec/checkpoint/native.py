"""Reads what `save` wrote: the value itself, or the torch.save file that it would have been."""

from __future__ import annotations

from typing import Any

from statecodec.atomic import AtomicOutput
from statecodec.checkpoint.nested import MAX_DEPTH, TREE, from_json
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs.plain import from_plain, is_plain
from statecodec.errors import FormatError, UsageError
from statecodec.lazy import torch
from statecodec.limits import Limits
from statecodec.strict import parse_json

_LIMITS = Limits(max_json_values=1 << 25, max_json_depth=4 * MAX_DEPTH)


def load_native(stored: StoredCheckpoint, device: torch.device | str = "cpu") -> Any:
    """The value that `save` was given; encoded tensors in their plain form. Raises FormatError."""
    try:
        item = stored.reader.index(TREE)
        value = parse_json(stored.decode(item).numpy().tobytes(), "the saved value", _LIMITS)
        return from_json(value, stored, {}, device)
    except (UsageError, ValueError, RecursionError) as error:
        raise FormatError(f"{stored.path}: no description of the saved value can be read: {error}") from error


def restore_native(stored: StoredCheckpoint, output: AtomicOutput) -> None:
    """Write the saved value as an ordinary torch.save file, with encoded tensors decoded."""
    with output.create() as file:
        torch.save(_decoded(load_native(stored)), file)


def _decoded(value: Any) -> Any:
    if is_plain(value):
        return from_plain(value).decode()
    if isinstance(value, dict):
        return type(value)((k, _decoded(v)) for k, v in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_decoded(v) for v in value)
    return value
