"""torch, imported when it is first used, so that what only reads headers does not wait a second for the import.

`layouts`, `format`, `codecs` and `checkpoint` describe tensors by `statecodec.dtypes`, and take torch from here:

    from statecodec.lazy import torch

Type checkers see torch itself. An import contract forbids these packages to import torch directly.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy:
    """Stands for a module, which is imported when an attribute is first used."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:  # used dozens of times a chunk: an import costs twenty times as much as this test
            self._module = importlib.import_module(self._name)
        return getattr(self._module, attribute)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")
