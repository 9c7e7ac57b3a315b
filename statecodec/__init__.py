"""statecodec: training checkpoints and optimizer state at a quarter of their size.

    report = statecodec.compress("ckpt.pt")                     -> ckpt.sc.safetensors
    statecodec.restore("ckpt.sc.safetensors", "ckpt.pt")
    ckpt = statecodec.load("ckpt.sc.safetensors")               what torch.load would give, nothing executed

docs/ has the file format, the codecs, the command line and the optimizers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from statecodec._version import __version__

if TYPE_CHECKING:
    from statecodec import distributed as distributed
    from statecodec import errors as errors
    from statecodec import optim as optim
    from statecodec.checkpoint.base import Checkpoint
    from statecodec.checkpoint.open import load
    from statecodec.checkpoint.open import open_checkpoint as open
    from statecodec.checkpoint.report import DiffReport, Report
    from statecodec.choose.snr_tracker import SNRTracker
    from statecodec.layouts.objects import OpaqueObject
    from statecodec.verbs.analysis import Analysis
    from statecodec.verbs.analyze import analyze
    from statecodec.verbs.compress import compress
    from statecodec.verbs.convert import convert
    from statecodec.verbs.diff import diff
    from statecodec.verbs.finalize import finalize
    from statecodec.verbs.inspect import inspect
    from statecodec.verbs.restore import restore
    from statecodec.verbs.save import save
    from statecodec.verbs.shares import compress_share
    from statecodec.verbs.verify import verify

__all__ = [
    "Analysis",
    "Checkpoint",
    "DiffReport",
    "OpaqueObject",
    "Report",
    "SNRTracker",
    "__version__",
    "analyze",
    "compress",
    "compress_share",
    "convert",
    "diff",
    "finalize",
    "inspect",
    "load",
    "open",
    "restore",
    "save",
    "verify",
]

# Imported when first used, so that `import statecodec` costs nothing beyond this file.
_HOMES = {
    "Analysis": "verbs.analysis",
    "Checkpoint": "checkpoint.base",
    "DiffReport": "checkpoint.report",
    "OpaqueObject": "layouts.objects",
    "Report": "checkpoint.report",
    "SNRTracker": "choose.snr_tracker",
    "analyze": "verbs.analyze",
    "compress": "verbs.compress",
    "compress_share": "verbs.shares",
    "convert": "verbs.convert",
    "diff": "verbs.diff",
    "finalize": "verbs.finalize",
    "inspect": "verbs.inspect",
    "load": "checkpoint.open",
    "open": "checkpoint.open",
    "restore": "verbs.restore",
    "save": "verbs.save",
    "verify": "verbs.verify",
}


_MODULES = ("distributed", "errors", "optim")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(module, "open_checkpoint" if name == "open" else name)
    globals()[name] = value
    return value
