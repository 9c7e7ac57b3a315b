"""The file format: a valid safetensors file that carries a manifest, checksums and, where it pays, packed chunks.

docs/format.md is normative. `Writer` and `Reader` move encoded parts and never look at numbers.
"""

from statecodec.format.finished import Finished, Written
from statecodec.format.items import ItemCheck, StoredChunk, StoredItem
from statecodec.format.packed_chunks import PackedChunk, VerifiedRecord
from statecodec.format.packing import Packing
from statecodec.format.placement import ItemSpec
from statecodec.format.reader import Reader
from statecodec.format.writer import Writer
from statecodec.limits import Limits

__all__ = [
    "Finished", "ItemCheck", "ItemSpec", "Limits", "PackedChunk", "Packing", "Reader", "StoredChunk", "StoredItem",
    "VerifiedRecord", "Writer", "Written",
]  # fmt: skip
