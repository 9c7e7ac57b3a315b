"""Compressed checkpoints inside of other frameworks, one module each: transformers, lightning, accelerate.

None of them is imported before it is asked for; each needs its framework (`pip install 'statecodec[transformers]'`).
"""

from __future__ import annotations

from statecodec.errors import BackendUnavailable


def not_installed(framework: str) -> BackendUnavailable:
    """The error of an integration whose framework is not there."""
    return BackendUnavailable(f"{framework} is not installed: pip install 'statecodec[{framework}]'")
