"""statecodec: training checkpoints and optimizer state at a third of their size.

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
    from statecodec.conversion import convert
    from statecodec.layouts.tree import OpaqueObject
    from statecodec.pipeline.analyze import Analysis, analyze
    from statecodec.pipeline.checkpoint import Checkpoint, load
    from statecodec.pipeline.checkpoint import open_checkpoint as open
    from statecodec.pipeline.compress import compress
    from statecodec.pipeline.diff import diff
    from statecodec.pipeline.inspect import inspect
    from statecodec.pipeline.native import save
    from statecodec.pipeline.report import DiffReport, Report
    from statecodec.pipeline.restore import restore
    from statecodec.pipeline.verify import verify
    from statecodec.policy.snr_tracker import SNRTracker

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
    "convert",
    "diff",
    "inspect",
    "load",
    "open",
    "restore",
    "save",
    "verify",
]

# Imported when first used, so that `import statecodec` costs nothing beyond this file.
_HOMES = {
    "Analysis": "pipeline.analyze",
    "Checkpoint": "pipeline.checkpoint",
    "DiffReport": "pipeline.report",
    "OpaqueObject": "layouts.tree",
    "Report": "pipeline.report",
    "SNRTracker": "policy.snr_tracker",
    "analyze": "pipeline.analyze",
    "compress": "pipeline.compress",
    "convert": "conversion",
    "diff": "pipeline.diff",
    "inspect": "pipeline.inspect",
    "load": "pipeline.checkpoint",
    "open": "pipeline.checkpoint",
    "restore": "pipeline.restore",
    "save": "pipeline.native",
    "verify": "pipeline.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(module, "open_checkpoint" if name == "open" else name)
    globals()[name] = value
    return value
