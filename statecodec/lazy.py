"""torch, imported when it is first used: what only reads headers does without the second that importing it takes.

`layouts`, `format`, `codecs` and `checkpoint` describe tensors by `statecodec.dtypes`, and take torch from here:

    from statecodec.lazy import torch

Type checkers see torch itself. An import contract keeps direct imports of torch out of those packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _Lazy:
    """Stands for a module until something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")
