"""torch, imported when it is first used: what only reads headers does without the second that importing it takes.

`layouts`, `format`, `codecs` and `checkpoint` describe tensors by `statecodec.dtypes`, and take torch from here:

    from statecodec.lazy import torch

Type checkers see torch itself. An import contract keeps direct imports of torch out of those packages.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy:
    """Stands for a module until something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:  # asked for dozens of times a chunk: importing again costs twenty times a look
            self._module = importlib.import_module(self._name)
        return getattr(self._module, attribute)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")
