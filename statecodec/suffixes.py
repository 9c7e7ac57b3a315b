"""Names of files: endings of compressed checkpoints and of those that frameworks write, and the index of many ranks."""

from __future__ import annotations

SUFFIX = ".sc.safetensors"
"""Of compressed checkpoints."""
INDEX = "statecodec.json"
"""Of the file of a folder that StatecodecWriter writes last: where it is, the checkpoint of all ranks is whole."""
TORCH_SUFFIXES = (".pth.tar", ".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (SUFFIX, ".safetensors", *TORCH_SUFFIXES, ".tar")  # the longer one of two that fit comes first


def stem(name: str) -> str:
    """A checkpoint's name without its ending, whatever its case; a name that is nothing else stays as it is.

    >>> stem("step_100.pt"), stem("run.sc.safetensors"), stem("step_100.notes"), stem(".pt")
    ('step_100', 'run', 'step_100.notes', '.pt')
    """
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name
