"""Compressed checkpoints inside other frameworks, one module each: transformers, lightning, accelerate.

Each module needs its framework (`pip install 'statecodec[transformers]'`), and is imported only by name.
"""

from __future__ import annotations

from statecodec.errors import BackendUnavailable


def not_installed(framework: str) -> BackendUnavailable:
    """The error of an integration whose framework is not installed."""
    return BackendUnavailable(f"{framework} is not installed: pip install 'statecodec[{framework}]'")
