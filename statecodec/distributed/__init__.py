"""Checkpoints and optimizer states of many processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from statecodec.suffixes import INDEX

if TYPE_CHECKING:
    from statecodec.distributed.reader import StatecodecReader
    from statecodec.distributed.writer import StatecodecWriter

__all__ = ["INDEX", "StatecodecReader", "StatecodecWriter"]


def __getattr__(name: str) -> Any:
    """Imported when first used: compressing on Ray needs neither."""
    if name == "StatecodecReader":
        from statecodec.distributed.reader import StatecodecReader

        return StatecodecReader
    if name == "StatecodecWriter":
        from statecodec.distributed.writer import StatecodecWriter

        return StatecodecWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
