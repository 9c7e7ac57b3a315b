"""Names of parameters without what wrappers add, keys of encoded states, and text that can always be shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What torch.compile, FSDP1, activation checkpointing and Lightning Fabric put before the names of what they wrap.
# They may wrap any submodule, so these words stand anywhere in a name.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.",
)
# DataParallel and DistributedDataParallel (Megatron nests two). Only in front: inside a name it may be the model's own.
_PARALLEL = re.compile(r"^(?:module\.)+")
_STATE = re.compile(r"([a-z]\w{0,15})\[((?:\d{1,18},){0,63}\d{1,18})?\] ([a-z]\w*\(.*\))")
_LONGEST = 4096  # characters: longer keys are not matched, which would take long
_PART_OF_STATE = re.compile(rf"(?:(.*)\.)?({_STATE.pattern})\.([^()\[\]]+)")


def bare_name(name: str) -> str:
    """The name without the words that wrappers add.

    Args:
        name: a dotted parameter name, as `named_parameters()` of the wrapped model gives it.

    Returns:
        The name that `named_parameters()` of the model itself would give.

    >>> bare_name("module.layers.0._checkpoint_wrapped_module.mlp.weight")
    'layers.0.mlp.weight'
    """
    return _PARALLEL.sub("", _WRAPPERS.sub("", name))


def state_key(dtype: str, shape: Sequence[int], codec: str) -> str:
    """The key under which a state dict holds the parts of an encoded state.

    >>> state_key("float32", (24, 70), "companded(version=2,bits=8)")
    'float32[24,70] companded(version=2,bits=8)'
    """
    return f"{dtype}[{','.join(map(str, shape))}] {codec}"


def parsed_state_key(key: str) -> tuple[str, tuple[int, ...], str] | None:
    """dtype, shape and codec that a key of `state_key` names; None for any other text."""
    match = _STATE.fullmatch(key) if len(key) <= _LONGEST else None
    return None if match is None else (match[1], tuple(int(n) for n in (match[2] or "").split(",") if n), match[3])


def split_state_part(path: str) -> tuple[str, str, str] | None:
    """A dotted path to a part of an encoded state as (path to the state, key of `state_key`, part); else None.

    >>> split_state_part("state.0.exp_avg.float32[4] raw(version=1).data")
    ('state.0.exp_avg', 'float32[4] raw(version=1)', 'data')
    """
    match = _PART_OF_STATE.fullmatch(path) if len(path) <= _LONGEST else None
    return None if match is None else (match[1] or "", match[2], match[6])


def shown(text: str) -> str:
    r"""Text as valid Unicode: a lone surrogate, which keys and file names may hold, is written with a backslash.

    Args:
        text: Any string, such as a file name from os.listdir.

    Returns:
        The same text, or one that can be encoded as UTF-8.

    >>> shown("caf\udce9.pt")
    'caf\\udce9.pt'
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
