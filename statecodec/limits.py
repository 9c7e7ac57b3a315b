"""What a reader accepts before it allocates anything, and the constants of the format itself.

Writers keep to the same limits: what they publish, the reader with its defaults opens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from statecodec.errors import LimitExceeded

# Constants of the format. They bound what a packed chunk can expand to, however small it is on disk.
MAX_PACKED_CHUNK = 64 << 20  # unpacked bytes of one chunk record; larger chunks are stored plain
MAX_SHARED = 1 << 20  # unpacked bytes of a record that small items share, and how many may
MAX_CHUNKS = 1 << 20  # of all items together, beyond those that the file holds a record or a checksum for
MAX_WINDOW = 8 << 20  # zstd window
MAX_DIMS = 64
MAX_EXPANSION = 16  # decoded bytes per stored byte of a chunk above MAX_PACKED_CHUNK (fp64 from 4-bit codes)

# How a compressed manifest may expand: so much at least, and in proportion to its stored bytes.
TEXT_BYTES, TEXT_EXPANSION = 16 << 20, 100
JSON_VALUES, JSON_VALUES_EXPANSION = 500_000, 12


@dataclass(frozen=True)
class Limits:
    """Upper bounds for an untrusted file; a reader raises LimitExceeded at the first one passed.

    A compressed manifest may have a text of eight times `max_manifest_bytes` and eight times `max_json_values`, but
    only in proportion to its size.

    Args:
        max_header_bytes: Size of a file's header.
        max_manifest_bytes: Size of the manifest, as it is stored.
        max_json_values: Values in one JSON text.
        max_json_depth: Nesting of one JSON text.
        max_items: Items of a file.
        max_shards: Files of an output.
        max_decoded_bytes: Bytes of all items decoded: folded, low-rank and dropped items may be far smaller on disk.
        max_whole_bytes: Bytes of one item of a codec that cannot be cut, but decodes in pieces (shared, low-rank).
    """

    max_header_bytes: int = 64 << 20
    max_manifest_bytes: int = 64 << 20
    max_json_values: int = 4_000_000
    max_json_depth: int = 64
    max_items: int = 1 << 21
    max_shards: int = 10_000
    max_decoded_bytes: int = 1 << 44
    max_whole_bytes: int = 1 << 33

    def manifest_text(self, stored: int) -> int:
        """How long the text of a manifest may be.

        Args:
            stored: Its stored bytes.

        Returns:
            The number of bytes.
        """
        return min(TEXT_BYTES + TEXT_EXPANSION * stored, 8 * self.max_manifest_bytes)

    def for_manifest(self, stored: int) -> Limits:
        """The same limits, with as many JSON values as a manifest of a certain size may have.

        Args:
            stored: Its stored bytes.

        Returns:
            The limits.
        """
        most = min(JSON_VALUES + JSON_VALUES_EXPANSION * stored, 8 * self.max_json_values)
        return replace(self, max_json_values=most)

    def check_chunk(self, label: str, decoded: int, stored: int, whole: bool) -> None:
        """Refuse a chunk that decodes to more than a reader would allocate.

        Args:
            label: What it is, for the message.
            decoded: Its bytes when decoded.
            stored: Bytes of its parts.
            whole: Whether it is an item that cannot be cut.

        Raises:
            LimitExceeded: If it is too large.
        """
        limit = self.max_whole_bytes if whole else max(MAX_PACKED_CHUNK, MAX_EXPANSION * stored)
        self.check(f"{label}: decoded bytes of one chunk", decoded, limit)

    def check(self, label: str, amount: int, limit: int) -> None:
        """Refuse an amount above a limit.

        Args:
            label: What it is, for the message.
            amount: What was found.
            limit: The largest that is accepted.

        Raises:
            LimitExceeded: If it is above.
        """
        if amount > limit:
            raise LimitExceeded(f"{label}: {amount:,} is above the limit of {limit:,}")
