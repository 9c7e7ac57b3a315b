"""Codecs: number representations of tensors, the same on disk and in a live optimizer.

To add one: write its file beside `raw.py`, add a line to `CODECS` in `spec.py`, a section to docs/codecs.md.
"""

from statecodec.codecs.base import Codec, EncodedTensor
from statecodec.codecs.cast import Cast
from statecodec.codecs.changes import Change
from statecodec.codecs.companded import Companded
from statecodec.codecs.direction import Direction
from statecodec.codecs.dropped import Dropped
from statecodec.codecs.encoding import INNER, Encoding
from statecodec.codecs.folded import Folded
from statecodec.codecs.following import Following
from statecodec.codecs.logarithmic import Logarithmic
from statecodec.codecs.lowrank import LowRank
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.codecs.raw import Raw
from statecodec.codecs.rows import rows_cols
from statecodec.codecs.same import Same
from statecodec.codecs.shared import Shared
from statecodec.codecs.spec import format_codec, from_config, get, names, parse
from statecodec.codecs.split import Split
from statecodec.codecs.ulps import Ulps
from statecodec.codecs.uniform import Uniform

__all__ = [
    "INNER", "NO_COMPANIONS", "Cast", "Change", "Codec", "Companded", "Companions", "Direction", "Dropped",
    "EncodedTensor", "Encoding", "Folded", "Following", "Logarithmic", "LowRank", "PartSpec", "Raw", "Same", "Shared",
    "Split", "Ulps", "Uniform", "format_codec", "from_config", "get", "names", "parse", "rows_cols",
]  # fmt: skip
