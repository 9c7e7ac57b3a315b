"""What a reader accepts before it allocates anything, and the constants of the format itself."""

from __future__ import annotations

from dataclasses import dataclass

from statecodec.errors import LimitExceeded

# Constants of format 1.x. They bound what a packed chunk can expand to, however small it is on disk.
MAX_PACKED_CHUNK = 64 << 20  # unpacked bytes of one chunk record; larger chunks are stored plain
MAX_WINDOW = 8 << 20  # zstd window
MAX_DIMS = 64


@dataclass(frozen=True)
class Limits:
    """Upper bounds for an untrusted file; a reader raises LimitExceeded at the first one passed.

    `max_decoded_bytes` counts all items decoded: folded, low-rank and dropped items may be far smaller on disk.
    """

    max_header_bytes: int = 64 << 20
    max_manifest_bytes: int = 64 << 20
    max_json_values: int = 4_000_000
    max_json_depth: int = 64
    max_items: int = 1 << 20
    max_shards: int = 10_000
    max_decoded_bytes: int = 1 << 44

    def check(self, what: str, found: int, limit: int) -> None:
        """Raise LimitExceeded if `found` is above `limit`."""
        if found > limit:
            raise LimitExceeded(f"{what}: {found:,} is above the limit of {limit:,}")
