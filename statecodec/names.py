"""Names: of parameters, as the bare model has them; of anything, as they can be shown."""

from __future__ import annotations

import re

# What torch.compile, FSDP1, activation checkpointing and Lightning Fabric put before the names of what they wrap.
# They may wrap any submodule, so these words stand anywhere in a name.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.",
)
# DataParallel and DistributedDataParallel (Megatron nests two). Only in front: inside a name it may be the model's own.
_PARALLEL = re.compile(r"^(?:module\.)+")


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
