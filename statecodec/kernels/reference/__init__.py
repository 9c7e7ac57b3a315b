"""The executable specification: every kernel in plain torch operations, written to be read."""

from statecodec.kernels.reference.centring import byte_counts, centre, uncentre
from statecodec.kernels.reference.companding import decode_companded, encode_companded
from statecodec.kernels.reference.folding import fold_mean, unfold
from statecodec.kernels.reference.planes import constant_byte, merge_planes, split_planes
from statecodec.kernels.reference.splitting import decode_split, encode_split
from statecodec.kernels.reference.statistics import compare, compare_updates

__all__ = [
    "byte_counts",
    "centre",
    "compare",
    "compare_updates",
    "constant_byte",
    "decode_companded",
    "decode_split",
    "encode_companded",
    "encode_split",
    "fold_mean",
    "merge_planes",
    "split_planes",
    "uncentre",
    "unfold",
]
